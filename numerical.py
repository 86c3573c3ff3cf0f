# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.9,<3", "scipy>=1.12,<2"]
# ///
# SPDX-License-Identifier: MIT-0
"""Numerical data: serial Python, multiprocessing and Ray filter one large image.

  serial                 one filter after the other
  multiprocessing        Pool.starmap, which pickles the image for every filter
  multiprocessing-tuned  the image in shared memory, which every worker maps
  ray                    the image in Ray's object store, which every worker maps

An implementation is a generator. Its first next() starts the workers; each next() does
the whole job once and yields the result; close() leaves the `with`, which stops them.
To copy one, keep the `with`, drop the loop and watch_workers, and return the result.

Run `python numerical.py` or `uv run numerical.py`. If RAY_ADDRESS is set, Ray joins it.
Timed in a pass: shipping the image, filtering it, collecting the results.
"""

import argparse
import contextlib
import json
import multiprocessing.connection
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

TITLE = "Numerical data: filter one large image with one random filter per worker"
FLAGS = {
    "--image-size": (3000, "pixels a side"),
    "--filter-size": (4, "pixels a side"),
    "--num-warmups": (5, "passes before the trials"),
}
spawn = multiprocessing.get_context("spawn")  # a fork beside threads can hang


def make_inputs(args):
    """Return an image (size, size) and filters (num_cpus, size, size), all float64."""
    rng = np.random.default_rng(args.seed)
    image = rng.random((args.image_size, args.image_size))
    filters = rng.random((args.num_cpus, args.filter_size, args.filter_size))
    return image, filters


def filter_image(image, image_filter):
    """Convolve a float64 image with a filter; return every fifth pixel, both ways."""
    filtered = scipy.signal.convolve2d(image, image_filter)[::5, ::5]
    return np.ascontiguousarray(filtered)  # a view would keep all of it alive


def freeze(result):
    """Return the bytes of a list of arrays, which can be compared in a set."""
    return np.stack(result).tobytes()


def serial(num_cpus, image, filters):
    while True:
        yield [filter_image(image, f) for f in filters]


def plain_pool(num_cpus, image, filters):
    with spawn.Pool(num_cpus) as pool, watch_workers():
        while True:
            yield pool.starmap(filter_image, [(image, f) for f in filters])


def map_image(array, shape):  # runs once in each worker
    global shared_image
    shared_image = np.frombuffer(array).reshape(shape)


def filter_shared_image(image_filter):
    return filter_image(shared_image, image_filter)


def tuned_pool(num_cpus, image, filters):
    array = spawn.RawArray("d", image.size)
    with spawn.Pool(num_cpus, map_image, (array, image.shape)) as pool, watch_workers():
        while True:
            np.frombuffer(array)[:] = image.ravel()
            yield pool.map(filter_shared_image, filters)


def ray_tasks(num_cpus, image, filters):
    import ray  # not at the top, since a Pool's workers import this file, too

    with ray.init(**ray_options(num_cpus)):
        filter_task = ray.remote(filter_image)
        while True:
            image_ref = ray.put(image)
            yield ray.get([filter_task.remote(image_ref, f) for f in filters])
            del image_ref  # or the object store holds two images


IMPLEMENTATIONS = {
    "serial": serial,
    "multiprocessing": plain_pool,
    "multiprocessing-tuned": tuned_pool,
    "ray": ray_tasks,
}


# ---- From here on the same in the three scripts: measure, report, watch a Pool ----


def ray_options(num_cpus):
    """Return arguments for ray.init: join RAY_ADDRESS, or start Ray on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ["", "local"]:
        return {"address": "local", "num_cpus": num_cpus, "logging_level": "WARNING"}
    print(f"\nRay joins {address} and needs {num_cpus} free CPUs", file=sys.stderr)
    return {"address": address}


@contextlib.contextmanager
def watch_workers():
    """End the script if a Pool's worker dies: the Pool would wait for it for ever."""
    workers = multiprocessing.active_children()
    finished = threading.Event()

    def watch():
        multiprocessing.connection.wait([worker.sentinel for worker in workers])
        time.sleep(0.1)  # the Pool may be fetching the exit code, or Ctrl-C ends all
        if finished.is_set():
            return
        exit_codes = {worker.exitcode for worker in workers} - {None}
        for worker in multiprocessing.active_children():
            worker.kill()  # it may wait for a lock that the dead one held
        with contextlib.suppress(OSError):  # if nobody reads it
            print("\nA Pool's worker died, exit code", *exit_codes, file=sys.stderr)
            print("(-9 mostly means that memory ran out)", file=sys.stderr)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def measure(implementation, inputs, args, results):
    """Return the seconds of every pass, warm-ups too; add frozen results to a set."""
    seconds = []
    with contextlib.closing(implementation(args.num_cpus, *inputs)) as passes:
        for _ in range(args.num_warmups + args.num_trials):
            start = time.perf_counter()
            result = next(passes)  # the first one starts the workers, too
            seconds.append(time.perf_counter() - start)
            results.add(freeze(result))
            del result  # or the next pass is charged for freeing it
    return seconds


def main():
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # the CPUs this process may use; not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=TITLE, formatter_class=formatter)
    names = list(IMPLEMENTATIONS)
    parser.add_argument("--implementations", nargs="+", choices=names, default=names)
    parser.add_argument("--num-cpus", type=int, default=cores, help="workers")
    parser.add_argument("--num-trials", type=int, default=5, help="passes that count")
    for flag, (default, text) in FLAGS.items():
        parser.add_argument(flag, type=int, default=default, help=text)
    parser.add_argument("--seed", type=int, default=0, help="for the inputs")
    parser.add_argument("--json", default=os.devnull, help="file to add JSON lines to")
    args = parser.parse_args()
    # Ray reads these when it is imported: no `uv run` in workers, no notice of tokens.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if os.environ.get("RAY_ADDRESS", "") in ["", "local"]:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if sys.stderr is None:  # it was closed, and Ray does not start without it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    inputs = make_inputs(args)
    print(f"{TITLE}, {args.num_cpus} workers")
    python = platform.python_version()
    print(f"{args.num_trials} trials, {args.num_warmups} warm-ups, Python {python}")
    print("\nseconds                   first   median      min      max  speedup")
    medians = []
    results = set()
    with open(args.json, "a") as file:
        for name in args.implementations:
            print(f"{name:22}", end="", flush=True)
            seconds = measure(IMPLEMENTATIONS[name], inputs, args, results)
            if len(results) > 1:
                sys.exit(f"\n{name} and {args.implementations[0]} differ in a result")
            trials = seconds[args.num_warmups :]
            median = statistics.median(trials)
            medians.append(median)
            print(f"{seconds[0]:9.2f}{median:9.3f}{min(trials):9.3f}", end="")
            print(f"{max(trials):9.3f}{medians[0] / median:8.2f}x")
            row = vars(args) | {"implementation": name, "median_seconds": median}
            row |= {"benchmark": parser.prog.removesuffix(".py"), "seconds": seconds}
            row |= {"python": python, "platform": platform.platform()}
            for package in {"numpy", "ray", "scipy", "tensorflow"} & sys.modules.keys():
                row[package] = sys.modules[package].__version__
            print(json.dumps(row), file=file, flush=True)
    print("All results agree.")


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a Pool's worker: the script answers Ctrl-C for all
    signal.signal(signal.SIGINT, signal.SIG_IGN)
