# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.9,<3", "scipy>=1.12,<2"]
# ///
# SPDX-License-Identifier: MIT-0
"""Numerical data: filter one large image with serial Python, multiprocessing and Ray.

  serial                 applies the filters one after another
  multiprocessing_naive  pickles the image once per filter
  multiprocessing_tuned  copies the image to shared memory once per pass
  ray_naive              copies the image to the object store once per filter
  ray_tuned              copies the image to the object store once per pass

Each function starts its workers, then loops `for _ in passes`, which times each pass:
send the image, filter it, collect the results. The first pass includes the start.

To reuse a function, copy it and what it uses. Call it with range(1) as passes, under
`if __name__ == "__main__":`. To start Ray, use ray.init("local", num_cpus=num_cpus).
Arrays that Ray returns are read-only.

Run `python numerical.py` or `uv run numerical.py`. Ray starts on this machine, or joins
the cluster at RAY_ADDRESS if set.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time

import numpy as np
import psutil
import scipy.signal

TITLE = "Numerical data: filter one large image with one random filter per worker"
mp = multiprocessing.get_context("spawn")  # forking beside threads can hang


def add_arguments(parser):
    parser.add_argument("--image-size", type=int, default=3000, help="pixels per side")
    parser.add_argument("--filter-size", type=int, default=4, help="pixels per side")


def make_inputs(args):
    """Return an image (size, size) and filters (num_cpus, size, size), all float64."""
    rng = np.random.default_rng(args.seed)
    image = rng.random((args.image_size, args.image_size))
    filters = rng.random((args.num_cpus, args.filter_size, args.filter_size))
    return image, filters


def freeze(results):
    """Return the bytes of a list of arrays, for comparison."""
    return np.stack(results).tobytes()


def filter_image(image, image_filter):
    """Convolve the image with the filter; return every fifth row and column."""
    filtered = scipy.signal.convolve2d(image, image_filter)
    return filtered[::5, ::5].copy()  # a view would keep the whole array alive


def serial(passes, num_cpus, image, filters):
    for _ in passes:
        results = [filter_image(image, f) for f in filters]
    return results


def multiprocessing_naive(passes, num_cpus, image, filters):
    with mp.Pool(num_cpus) as pool:
        for _ in passes:
            results = pool.starmap(filter_image, [(image, f) for f in filters])
    return results


def attach_image(memory, shape):  # runs once in each worker
    global shared_image
    shared_image = np.frombuffer(memory).reshape(shape)


def filter_shared_image(image_filter):
    return filter_image(shared_image, image_filter)


def multiprocessing_tuned(passes, num_cpus, image, filters):
    memory = mp.RawArray("d", image.size)  # "d" is float64
    shared = np.frombuffer(memory).reshape(image.shape)
    with mp.Pool(num_cpus, attach_image, (memory, image.shape)) as pool:
        for _ in passes:
            shared[:] = image
            results = pool.map(filter_shared_image, filters)
    return results


def ray_naive(passes, num_cpus, image, filters):
    import ray  # not at the top, as a Pool's workers import this file, too

    with ray.init(**ray_options(num_cpus)):
        task = ray.remote(filter_image)
        for _ in passes:
            results = ray.get([task.remote(image, f) for f in filters])
    return results


def ray_tuned(passes, num_cpus, image, filters):
    import ray

    with ray.init(**ray_options(num_cpus)):
        task = ray.remote(filter_image)
        for _ in passes:
            image_ref = ray.put(image)
            results = ray.get([task.remote(image_ref, f) for f in filters])
            del image_ref  # or the store holds two images
    return results


# ---- From here on identical in numerical.py, stateful.py and expensive_init.py ----

FUNCTIONS = [serial, multiprocessing_naive, multiprocessing_tuned, ray_naive, ray_tuned]
IMPLEMENTATIONS = {function.__name__: function for function in FUNCTIONS}
RAY_ADDRESS = os.environ.get("RAY_ADDRESS") or "local"


def ray_options(num_cpus):
    """Return arguments for ray.init, to start Ray or to join a cluster."""
    if RAY_ADDRESS != "local":
        num_cpus = None  # ray.init rejects it when joining a cluster
    return {"address": RAY_ADDRESS, "num_cpus": num_cpus, "logging_level": "WARNING"}


def measure(implementation, args, inputs):
    """Return the seconds that each pass took, and the last result, frozen."""
    finished = threading.Event()
    threading.Thread(target=watch_workers, args=[finished], daemon=True).start()
    times = [time.perf_counter()]  # the first pass includes starting the workers

    def passes():
        for _ in range(args.num_warmups + args.num_trials):
            yield
            times.append(time.perf_counter())
        finished.set()  # from here on, a worker may end

    result = implementation(passes(), args.num_cpus, *inputs)
    return [end - start for start, end in itertools.pairwise(times)], freeze(result)


def watch_workers(finished):
    """Exit if a Pool's worker dies, because the Pool would wait for it forever."""
    workers = set()
    while not finished.wait(timeout=0.1):
        workers.update(multiprocessing.active_children())
        for worker in workers:
            pool_ends = worker.exitcode == -signal.SIGTERM  # after an error or Ctrl-C
            if worker.exitcode and not finished.wait(timeout=10 if pool_ends else 1):
                print("\nA worker has ended:", worker, file=sys.stderr)
                print("If by SIGKILL, lower --num-cpus to save memory", file=sys.stderr)
                os._exit(1)


def follow_script():
    """End this worker with the script, even if it waits for a killed worker's lock."""
    while multiprocessing.parent_process() is None:  # while this file is imported
        time.sleep(0.1)
    multiprocessing.parent_process().join()
    os._exit(1)


def parse_arguments():
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # Linux: the CPUs this process may use
        cores = min(cores, len(os.sched_getaffinity(0)))
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=TITLE, formatter_class=formatter)
    names = list(IMPLEMENTATIONS)
    parser.add_argument("--implementations", nargs="+", choices=names, default=names)
    parser.add_argument("--num-cpus", type=int, default=cores, help="number of workers")
    parser.add_argument("--num-warmups", type=int, default=3, help="warm-up passes")
    parser.add_argument("--num-trials", type=int, default=5, help="measured passes")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--json", default=os.devnull, help="file to append JSON to")
    add_arguments(parser)
    args = parser.parse_args()
    if args.num_cpus < 1 or args.num_trials < 1 or args.num_warmups < 0:
        parser.error("--num-cpus and --num-trials start at 1, --num-warmups at 0")
    return args


def main():
    args = parse_arguments()
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # no `uv` in workers
    print(f"{TITLE} ({args.num_cpus} workers)")
    if RAY_ADDRESS == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # or Ray prints a note on it
    else:
        print(f"Ray joins {RAY_ADDRESS}, which needs {args.num_cpus} free CPUs")
    import ray  # after its settings, and before any timing

    inputs = make_inputs(args)
    setup = vars(args) | {"python": sys.version, "ray": ray.__version__}
    reference = args.implementations[0]
    print("\nseconds                   first   median      min      max  speedup")
    with open(args.json, "a") as file:
        for name in args.implementations:
            print(f"{name:22}", end="", flush=True)
            seconds, result = measure(IMPLEMENTATIONS[name], args, inputs)
            trials = seconds[args.num_warmups :]
            median = statistics.median(trials)
            if name == reference:
                expected = result
                baseline = median
            elif result != expected:
                sys.exit(f"\nThe results of {name} and {reference} differ")
            print(f"{seconds[0]:9.3f}{median:9.3f}{min(trials):9.3f}", end="")
            print(f"{max(trials):9.3f}{baseline / median:8.2f}x")
            row = {"script": os.path.basename(__file__), "implementation": name}
            print(json.dumps(row | setup | {"seconds": seconds}), file=file, flush=True)
    print("All implementations agree.")


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # in a Pool's worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is left to the script
    threading.Thread(target=follow_script, daemon=True).start()
