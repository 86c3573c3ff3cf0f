# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.9,<3", "tensorflow>=2.18,<3"]
# ///
# SPDX-License-Identifier: MIT-0
"""Expensive initialization: classify images with serial Python, multiprocessing and Ray.

  serial                 loads model and images once, and uses num_cpus threads
  multiprocessing_naive  loads them in every call
  multiprocessing_tuned  loads them once per worker, in the Pool's initializer
  ray_naive              loads them in every call
  ray_tuned              loads them once per worker, in an actor

Each function starts its workers, then loops `for _ in passes`, which times each pass:
send positions, classify, collect the labels. The first pass includes the start.

To reuse a function, copy it and what it uses. Call it with range(1) as passes, under
`if __name__ == "__main__":`. To start Ray, use ray.init("local", num_cpus=num_cpus).

Run save_model.py first, then `python expensive_init.py`. Ray starts on this machine, or
joins the cluster at RAY_ADDRESS if set; then each node needs the model in this folder.
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

TITLE = "Expensive initialization: classify images with a neural network"
mp = multiprocessing.get_context("spawn")  # forking beside threads can hang


def add_arguments(parser):
    parser.add_argument("--num-batches", type=int, default=20, help="per worker")
    parser.add_argument("--batch-size", type=int, default=1000, help="images per batch")


def make_inputs(args):
    """Return the files' folder and batches (start, stop); exit if a file is missing."""
    folder = os.getcwd()
    for name in ["model.keras", "images.npy"]:
        if not os.path.exists(name):
            sys.exit(f"{name} is not in this folder: run save_model.py first")
    num_images = len(np.load("images.npy", mmap_mode="r"))
    if args.batch_size > num_images:
        sys.exit(f"--batch-size {args.batch_size}: images.npy has {num_images} images")
    rng = np.random.default_rng(args.seed)
    num_batches = args.num_cpus * args.num_batches
    starts = rng.integers(num_images - args.batch_size + 1, size=num_batches).tolist()
    return folder, [(start, start + args.batch_size) for start in starts]


def freeze(results):
    """Return the bytes of a list of arrays, for comparison."""
    return np.concatenate(results).tobytes()


def import_tensorflow(num_threads):
    """Import TensorFlow for the CPU, to use num_threads threads, and return it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # or each process claims every GPU
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["TF_USE_LEGACY_KERAS"] = "0"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # fatal errors only
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:  # it writes six lines all the same
        os.dup2(devnull.fileno(), 2)
    try:
        import tensorflow as tf
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    tf.get_logger().setLevel("ERROR")  # no advice against loading in every call
    tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    return tf


class Classifier:
    """A model and the images that it classifies, loaded from the files in a folder."""

    def __init__(self, folder, num_threads=1):
        tf = import_tensorflow(num_threads)
        self.model = tf.keras.models.load_model(os.path.join(folder, "model.keras"))
        self.images = np.load(os.path.join(folder, "images.npy"))

    def classify(self, start, stop):
        """Return the labels of images[start:stop], int64 (stop - start,)."""
        return self.model.predict_on_batch(self.images[start:stop]).argmax(axis=1)


def serial(passes, num_cpus, folder, batches):
    classifier = Classifier(folder, num_threads=num_cpus)
    for _ in passes:
        results = [classifier.classify(start, stop) for start, stop in batches]
    return results


def load_and_classify(folder, start, stop):
    return Classifier(folder).classify(start, stop)


def multiprocessing_naive(passes, num_cpus, folder, batches):
    with mp.Pool(num_cpus) as pool:
        for _ in passes:
            calls = [(folder, start, stop) for start, stop in batches]
            results = pool.starmap(load_and_classify, calls, chunksize=1)
    return results


def load_classifier(folder):  # runs once in each worker
    global worker_classifier
    worker_classifier = Classifier(folder)


def worker_classify(start, stop):
    return worker_classifier.classify(start, stop)


def multiprocessing_tuned(passes, num_cpus, folder, batches):
    with mp.Pool(num_cpus, load_classifier, [folder]) as pool:
        for _ in passes:
            results = pool.starmap(worker_classify, batches, chunksize=1)
    return results


def ray_naive(passes, num_cpus, folder, batches):
    import ray  # not at the top, as a Pool's workers import this file, too

    with ray.init(**ray_options(num_cpus)):
        task = ray.remote(load_and_classify)
        for _ in passes:
            results = ray.get([task.remote(folder, *batch) for batch in batches])
    return results


def ray_tuned(passes, num_cpus, folder, batches):
    import ray

    with ray.init(**ray_options(num_cpus)):
        actor_class = ray.remote(num_cpus=1)(Classifier)  # one actor per CPU
        actors = [actor_class.remote(folder) for _ in range(num_cpus)]
        for _ in passes:
            labels = []
            for actor, batch in zip(itertools.cycle(actors), batches):
                labels.append(actor.classify.remote(*batch))
            results = ray.get(labels)
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
