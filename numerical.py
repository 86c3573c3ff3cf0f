# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.60,<3", "scipy>=1.12,<2"]
# ///
# SPDX-License-Identifier: MIT-0
"""Numerical data: filter one image with one random filter per worker.

  serial                 one filter after the other
  multiprocessing        Pool.starmap, which pickles the image for every filter
  multiprocessing-tuned  the image in shared memory, which every worker maps
  ray                    the image in Ray's object store, which every worker maps

Run: python numerical.py, or uv run numerical.py with nothing installed but uv.
Timed in a pass: shipping the image, filtering, collecting the results.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import threading
import time

import numpy as np
import psutil
import scipy.signal

PACKAGES = ["numpy", "ray", "scipy"]
spawn = multiprocessing.get_context("spawn")


def add_arguments(add):
    add("--image-size", type=positive, default=3000, help="pixels a side")
    add("--filter-size", type=positive, default=4, help="pixels a side")
    # Ray's first passes can be slower than the later ones.
    add("--num-warmups", type=positive, default=5, help="passes before the trials")


def make_inputs(args, num_cpus):
    """Return an image (size, size) and filters (num_cpus, size, size), all float64."""
    rng = np.random.default_rng(abs(args.seed))  # NumPy refuses negative seeds
    image = rng.random((args.image_size, args.image_size))
    filters = rng.random((num_cpus, args.filter_size, args.filter_size))
    return image, filters


def filter_image(image, image_filter):
    """Convolve a float64 image with a filter; return every fifth pixel, both ways."""
    filtered = scipy.signal.convolve2d(image, image_filter)[::5, ::5]
    return np.ascontiguousarray(filtered)  # which Ray returns without a copy


def digest(result):
    """Return the sha256, in hexadecimal, of a list of arrays of equal shape."""
    return hashlib.sha256(np.stack(result).tobytes()).hexdigest()


@contextlib.contextmanager  # sets up, yields the function that makes a pass, tidies up
def serial(num_cpus, image, filters):
    def run_pass():
        return [filter_image(image, f) for f in filters]

    yield run_pass


@contextlib.contextmanager
def plain_pool(num_cpus, image, filters):
    calls = [(image, f) for f in filters]
    with spawn.Pool(num_cpus) as pool:

        def run_pass():
            return pool.starmap(filter_image, calls, chunksize=1)

        yield run_pass


def keep_image(buffer, shape):  # runs once in each worker
    global shared_image
    shared_image = np.frombuffer(buffer).reshape(shape)


def filter_shared_image(image_filter):
    return filter_image(shared_image, image_filter)


@contextlib.contextmanager
def tuned_pool(num_cpus, image, filters):
    buffer = spawn.RawArray("d", image.size)
    with spawn.Pool(num_cpus, keep_image, (buffer, image.shape)) as pool:

        def run_pass():
            np.frombuffer(buffer)[:] = image.ravel()
            return pool.map(filter_shared_image, filters, chunksize=1)

        yield run_pass


@contextlib.contextmanager
def ray_tasks(num_cpus, image, filters):
    with start_ray(num_cpus) as ray:
        filter_task = ray.remote(filter_image)

        def run_pass():
            image_ref = ray.put(image)
            return ray.get([filter_task.remote(image_ref, f) for f in filters])

        yield run_pass


IMPLEMENTATIONS = {
    "serial": serial,
    "multiprocessing": plain_pool,
    "multiprocessing-tuned": tuned_pool,
    "ray": ray_tasks,
}


# ---- From here on the same in the three scripts: start Ray, measure, report ----


@contextlib.contextmanager
def start_ray(num_cpus):
    """Yield the ray module, joined to the cluster of RAY_ADDRESS or started here."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    # Ray reads these as it is imported. 0: its workers use this Python, not a `uv run`
    # of their own. token: the default, which Ray announces unless it is set.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray  # not at the top, since a Pool's workers import this file, too

    if sys.stderr is None:  # it was closed, and Ray does not start without it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if address == "local":
        with ray.init("local", num_cpus=num_cpus, logging_level="WARNING"):
            yield ray
    else:
        with ray.init(address):
            print(f"Waiting for {num_cpus} free CPUs in Ray's cluster", file=sys.stderr)
            group = ray.util.placement_group([{"CPU": 1}] * num_cpus)
            ray.get(group.ready())
            ray.util.remove_placement_group(group)  # it was made only to wait
            yield ray


@contextlib.contextmanager
def watch_pools():
    """End the script if a Pool's worker dies, for which the Pool would wait for ever."""
    workers = multiprocessing.active_children()  # of the Pools that run by now
    finished = threading.Event()

    def watch():
        while not finished.wait(0.1):
            exit_codes = {worker.exitcode for worker in workers} - {None}
            if exit_codes:
                print("A Pool's worker died, exit code", *exit_codes, file=sys.stderr)
                print("(-9 mostly means that memory ran out)", file=sys.stderr)
                for worker in multiprocessing.active_children():
                    worker.kill()  # it may wait for a lock that the dead one held
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def measure(name, num_cpus, inputs, args):
    """Return the seconds of the first pass, those of the trials, and all digests."""
    seconds = []
    digests = []
    start = time.perf_counter()  # so the first pass includes all set-up
    with IMPLEMENTATIONS[name](num_cpus, *inputs) as run_pass, watch_pools():
        for _ in range(args.num_warmups + args.num_trials):
            result = run_pass()
            seconds.append(time.perf_counter() - start)
            digests.append(digest(result))
            del result  # or the next pass is charged for freeing it
            if sys.stdout and sys.stdout.isatty():
                print(f"{name}: {len(seconds)} passes", end="\r", flush=True)
            start = time.perf_counter()
    return seconds[0], seconds[args.num_warmups :], digests


def compare(args, num_cpus, settings):
    """Print a table for num_cpus workers; add its rows to the file of --json."""
    inputs = make_inputs(args, num_cpus)
    print(f"\n{num_cpus} workers, {args.num_trials} trials, {args.num_warmups} warmups")
    print(f"{'seconds':22}{'first':>9}{'mean':>9}{'std':>9}{'speedup':>9}", flush=True)
    means = []
    results = set()
    for name in args.implementations:
        first, trials, digests = measure(name, num_cpus, inputs, args)
        results.update(digests)
        if len(results) > 1:
            sys.exit(f"A result of {name} differs from {args.implementations[0]}'s")
        mean = statistics.mean(trials)
        std = statistics.stdev(trials) if len(trials) > 1 else 0.0
        means.append(mean)
        speedup = means[0] / mean
        print(f"{name:22}{first:9.2f}{mean:9.3f}{std:9.3f}{speedup:8.2f}x", flush=True)
        row = settings | {"implementation": name, "num_cpus": num_cpus}
        row |= {"first_seconds": first, "trial_seconds": trials, "mean_seconds": mean}
        row |= {"std_seconds": std, "speedup": speedup, "result_sha256": digests[0]}
        with open(args.json, "a") as file:
            print(json.dumps(row), file=file)
    if len(args.implementations) > 1:
        print("All results agree.")


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main():
    title = __doc__.splitlines()[0]
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # the CPUs this process may use; not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    names = list(IMPLEMENTATIONS)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=title, formatter_class=formatter)
    add = parser.add_argument
    add("--implementations", nargs="+", choices=names, default=names, help="in order")
    add("--num-cpus", nargs="+", type=positive, default=[cores], help="workers")
    add("--num-trials", type=positive, default=5, help="timed passes")
    add("--seed", type=int, default=0, help="for the inputs")
    add("--json", metavar="FILE", default=os.devnull, help="to add JSON lines to")
    add_arguments(add)
    args = parser.parse_args()
    try:
        open(args.json, "a").close()
    except OSError as error:
        parser.error(f"--json: {error}")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    print(title)
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    settings = vars(args) | versions
    settings["benchmark"] = os.path.basename(__file__).removesuffix(".py")
    settings["platform"] = platform.platform()
    del settings["implementations"], settings["json"]
    for num_cpus in args.num_cpus:
        compare(args, num_cpus, settings)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a Pool's worker: the script answers Ctrl-C for all
    signal.signal(signal.SIGINT, signal.SIG_IGN)
