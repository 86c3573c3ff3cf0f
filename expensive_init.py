# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.9,<3", "tensorflow>=2.18,<3"]
# ///
# SPDX-License-Identifier: MIT-0
"""Expensive initialization: serial Python, multiprocessing and Ray classify images.

  serial                 loads it once; TensorFlow uses every core
  multiprocessing        Pool.starmap, which loads it in every call
  multiprocessing-tuned  a Pool whose initializer loads it, once per worker
  ray                    an actor per worker, which loads it when it starts

An implementation is a generator. Its first next() starts the workers; each next() does
the whole job once and yields the result; close() leaves the `with`, which stops them.
To copy one, keep the `with`, drop the loop and watch_workers, and return the result.

Run save_model.py first. If RAY_ADDRESS is set, Ray joins it; each node needs the model.
Timed in a pass: sending positions, loading in calls, classifying, collecting labels.
"""

import argparse
import contextlib
import itertools
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

TITLE = "Expensive initialization: classify images with a neural network"
FLAGS = {
    "--num-batches": (50, "batches per worker"),
    "--batch-size": (1000, "images of a batch"),
    "--num-warmups": (1, "passes before the trials"),
}
spawn = multiprocessing.get_context("spawn")  # a fork beside TensorFlow's threads hangs


def make_inputs(args):
    """Return the files' folder and batches (start, stop); exit if there are too few."""
    folder = os.getcwd()  # an absolute path: on a cluster, every node looks there
    for name in ["model.keras", "images.npy"]:
        if not os.path.exists(os.path.join(folder, name)):
            sys.exit(f"{name} is not in this folder: run save_model.py first")
    num_images = len(np.load(os.path.join(folder, "images.npy"), mmap_mode="r"))
    if args.batch_size > num_images:
        sys.exit(f"--batch-size {args.batch_size}: images.npy has {num_images} images")
    rng = np.random.default_rng(args.seed)
    num_batches = args.num_cpus * args.num_batches
    starts = rng.integers(num_images - args.batch_size + 1, size=num_batches).tolist()
    return folder, [(start, start + args.batch_size) for start in starts]


@contextlib.contextmanager
def silent_stderr():
    """Discard what is written to descriptor 2 inside the block, unless it is closed."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def import_tensorflow(num_threads):
    """Import TensorFlow with num_threads threads (0: it decides), and return it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # or each process claims every GPU
    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_USE_LEGACY_KERAS": "0"}
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # fatal errors alone
    with silent_stderr():  # it writes six lines all the same
        import tensorflow as tf
    tf.get_logger().setLevel("ERROR")
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


def freeze(result):
    """Return the bytes of a list of arrays, which can be compared in a set."""
    return np.concatenate(result).tobytes()


def serial(num_cpus, folder, batches):
    classifier = Classifier(folder, num_threads=0)
    while True:
        yield [classifier.classify(start, stop) for start, stop in batches]


def load_and_classify(folder, start, stop):
    return Classifier(folder).classify(start, stop)


def plain_pool(num_cpus, folder, batches):
    with spawn.Pool(num_cpus) as pool, watch_workers():
        while True:
            calls = [(folder, start, stop) for start, stop in batches]
            yield pool.starmap(load_and_classify, calls, chunksize=1)


def load_classifier(folder):  # runs once in each worker
    global worker_classifier
    worker_classifier = Classifier(folder)


def classify_in_worker(start, stop):
    return worker_classifier.classify(start, stop)


def tuned_pool(num_cpus, folder, batches):
    with spawn.Pool(num_cpus, load_classifier, [folder]) as pool, watch_workers():
        while True:
            yield pool.starmap(classify_in_worker, batches, chunksize=1)


def ray_actors(num_cpus, folder, batches):
    import ray  # not at the top, since a Pool's workers import this file, too

    with ray.init(**ray_options(num_cpus)):
        options = {"num_cpus": 1, "max_restarts": 3, "max_task_retries": 3}
        classifier_class = ray.remote(**options)(Classifier)
        actors = [classifier_class.remote(folder) for _ in range(num_cpus)]
        while True:
            labels = []
            for actor, (start, stop) in zip(itertools.cycle(actors), batches):
                labels.append(actor.classify.remote(start, stop))
            yield ray.get(labels)


IMPLEMENTATIONS = {
    "serial": serial,
    "multiprocessing": plain_pool,
    "multiprocessing-tuned": tuned_pool,
    "ray": ray_actors,
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
