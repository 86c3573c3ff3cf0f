# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["psutil>=5.9", "ray>=2.9,<3"]
# ///
# SPDX-License-Identifier: MIT-0
"""Stateful computation: serial Python, multiprocessing and Ray count prefixes.

  serial                 one counter
  multiprocessing        Pool.starmap: all counts travel into every call and out again
  multiprocessing-tuned  a Pool of one process per worker, which keeps its counts
  ray                    an actor per worker, which keeps its counts

An implementation is a generator. Its first next() starts the workers; each next() does
the whole job once and yields the result; close() leaves the `with`, which stops them.
To copy one, keep the `with`, drop the loop and watch_workers, and return the result.

Run `python stateful.py` or `uv run stateful.py`. If RAY_ADDRESS is set, Ray joins it.
Timed in a pass: sending the words, counting from zero, collecting the popular prefixes.
"""

import argparse
import collections
import contextlib
import itertools
import json
import multiprocessing.connection
import os
import platform
import random
import signal
import statistics
import sys
import threading
import time

import psutil

TITLE = "Stateful computation: find the popular prefixes in a stream of documents"
FLAGS = {
    "--num-documents": (10, "documents per worker"),
    "--words-per-document": (10000, "words"),
    "--word-length": (20, "bytes of a word"),
    "--num-warmups": (1, "passes before the trials"),
}
spawn = multiprocessing.get_context("spawn")  # a fork beside threads can hang
freeze = frozenset  # makes a result comparable in a set


def make_inputs(args):
    """Return a tuple of one: batches of num_cpus documents, each a list of bytes."""
    rng = random.Random(args.seed)

    def make_document():
        return [rng.randbytes(args.word_length) for _ in range(args.words_per_document)]

    batches = []
    for _ in range(args.num_documents):
        batches.append([make_document() for _ in range(args.num_cpus)])
    return (batches,)


def split(documents, num_cpus):
    """Return num_cpus lists of words, which a word's first byte (0 to 255) selects."""
    shares = [[] for _ in range(num_cpus)]
    for word in itertools.chain(*documents):
        shares[word[0] % num_cpus].append(word)
    return shares


class PrefixCounter:
    """Counts how often each proper prefix (b"a" and b"ab" of b"abc") has been seen."""

    def __init__(self, counts=()):
        self.counts = collections.Counter(counts)

    def add(self, words):
        self.counts.update(word[:end] for word in words for end in range(1, len(word)))

    def pop_popular(self):
        """Return the set of prefixes seen more than 3 times, and forget all counts."""
        popular = {prefix for prefix, count in self.counts.items() if count > 3}
        self.counts.clear()
        return popular


def serial(num_cpus, batches):
    counter = PrefixCounter()
    while True:
        for documents in batches:
            counter.add(itertools.chain(*documents))
        yield counter.pop_popular()


def add_words(counts, words):
    """Return the counts, a dict, with the words added."""
    counter = PrefixCounter(counts)
    counter.add(words)
    return dict(counter.counts)  # which pickles faster than a Counter


def plain_pool(num_cpus, batches):
    with spawn.Pool(num_cpus) as pool, watch_workers():
        while True:
            counts = [{} for _ in range(num_cpus)]
            for documents in batches:
                shares = split(documents, num_cpus)
                counts = pool.starmap(add_words, zip(counts, shares))
            popular = [PrefixCounter(c).pop_popular() for c in counts]
            del counts  # or the next pass is charged for freeing them
            yield set().union(*popular)


worker_counter = PrefixCounter()  # each process of the tuned Pools has its own


def worker_add(words):
    worker_counter.add(words)


def worker_pop_popular():
    return worker_counter.pop_popular()


def tuned_pool(num_cpus, batches):
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(spawn.Pool(1)) for _ in range(num_cpus)]
        stack.enter_context(watch_workers())
        while True:
            adds = []
            for documents in batches:
                for pool, words in zip(pools, split(documents, num_cpus)):
                    adds.append(pool.apply_async(worker_add, [words]))
            for add in adds:
                add.get()  # raises what the call raised
            pops = [pool.apply_async(worker_pop_popular) for pool in pools]
            yield set().union(*[pop.get() for pop in pops])


def ray_actors(num_cpus, batches):
    import ray  # not at the top, since a Pool's workers import this file, too

    with ray.init(**ray_options(num_cpus)):
        counter_class = ray.remote(num_cpus=1)(PrefixCounter)
        actors = [counter_class.remote() for _ in range(num_cpus)]
        while True:
            adds = []
            for documents in batches:
                for actor, words in zip(actors, split(documents, num_cpus)):
                    adds.append(actor.add.remote(words))
            ray.get(adds)  # raises what the call raised
            pops = [actor.pop_popular.remote() for actor in actors]
            yield set().union(*ray.get(pops))


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
