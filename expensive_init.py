# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.60,<3", "tensorflow>=2.18,<3"]
# ///
# SPDX-License-Identifier: MIT-0
"""Expensive initialization: classify images with a model that takes long to load.

  serial                 loads once; TensorFlow uses every core
  multiprocessing        Pool.starmap, which loads in every call
  multiprocessing-tuned  a Pool whose initializer loads, once per worker
  ray                    an actor per worker, which loads when it starts

Run: python save_model.py && python expensive_init.py (or uv run, with nothing but uv).
Timed in a pass: sending positions, loading if calls do it, classifying, collecting labels.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import threading
import time

import numpy as np
import psutil

PACKAGES = ["keras", "keras-nightly", "numpy", "ray", "tensorflow", "tensorflow-cpu"]
spawn = multiprocessing.get_context("spawn")


def add_arguments(add):
    add("--num-batches", type=positive, default=20, help="batches per worker")
    add("--batch-size", type=positive, default=1000, help="images of a batch")
    add("--num-warmups", type=positive, default=1, help="passes before the trials")


def make_inputs(args, num_cpus):
    """Return the folder of model and images, and the batches: tuples (start, stop).

    Exits if there is no model, or if a batch is larger than the images.
    """
    folder = os.getcwd()  # an absolute path: on a cluster, every node looks there
    for name in ["model.keras", "images.npy"]:
        if not os.path.exists(os.path.join(folder, name)):
            sys.exit(f"{name} is not in this folder: run save_model.py first")
    num_images = len(np.load(os.path.join(folder, "images.npy"), mmap_mode="r"))
    if args.batch_size > num_images:
        sys.exit(f"--batch-size {args.batch_size}: images.npy has {num_images} images")
    rng = random.Random(args.seed)
    batches = []
    for _ in range(num_cpus * args.num_batches):
        start = rng.randrange(num_images - args.batch_size + 1)
        batches.append((start, start + args.batch_size))
    return folder, batches


def import_tensorflow(num_threads):
    """Import TensorFlow with num_threads threads (0: it decides), and return it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # or each process claims every GPU
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["TF_USE_LEGACY_KERAS"] = "0"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # fatal errors alone
    # While it is imported, TensorFlow writes to stderr all the same.
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        import tensorflow as tf
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    tf.get_logger().setLevel("ERROR")
    # Once TensorFlow runs, it accepts no other number.
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


def digest(result):
    """Return the sha256, in hexadecimal, of a list of arrays."""
    return hashlib.sha256(np.concatenate(result).tobytes()).hexdigest()


@contextlib.contextmanager  # sets up, yields the function that makes a pass, tidies up
def serial(num_cpus, folder, batches):
    classifier = Classifier(folder, num_threads=0)

    def run_pass():
        return [classifier.classify(start, stop) for start, stop in batches]

    yield run_pass


def load_and_classify(folder, start, stop):
    return Classifier(folder).classify(start, stop)


@contextlib.contextmanager
def plain_pool(num_cpus, folder, batches):
    with spawn.Pool(num_cpus) as pool:

        def run_pass():
            calls = [(folder, start, stop) for start, stop in batches]
            return pool.starmap(load_and_classify, calls, chunksize=1)

        yield run_pass


def load_classifier(folder):  # runs once in each worker
    global worker_classifier
    worker_classifier = Classifier(folder)


def classify_in_worker(start, stop):
    return worker_classifier.classify(start, stop)


@contextlib.contextmanager
def tuned_pool(num_cpus, folder, batches):
    with spawn.Pool(num_cpus, load_classifier, [folder]) as pool:

        def run_pass():
            return pool.starmap(classify_in_worker, batches, chunksize=1)

        yield run_pass


@contextlib.contextmanager
def ray_actors(num_cpus, folder, batches):
    with start_ray(num_cpus) as ray:
        # An actor that dies is restarted, and its lost calls are repeated.
        options = {"num_cpus": 1, "max_restarts": 3, "max_task_retries": 3}
        actor_class = ray.remote(**options)(Classifier)
        actors = [actor_class.remote(folder) for _ in range(num_cpus)]

        def run_pass():
            labels = []
            for actor, (start, stop) in zip(itertools.cycle(actors), batches):
                labels.append(actor.classify.remote(start, stop))
            return ray.get(labels)

        yield run_pass


IMPLEMENTATIONS = {
    "serial": serial,
    "multiprocessing": plain_pool,
    "multiprocessing-tuned": tuned_pool,
    "ray": ray_actors,
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
