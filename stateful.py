# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["psutil>=5.9", "ray>=2.60,<3"]
# ///
# SPDX-License-Identifier: MIT-0
"""Stateful computation: find the popular prefixes in a stream of documents.

  serial                 one counter
  multiprocessing        Pool.starmap: all counts travel into every call and out again
  multiprocessing-tuned  a Pool of one process per worker, which keeps its counts
  ray                    an actor per worker, which keeps its counts

Run: python stateful.py, or uv run stateful.py with nothing installed but uv.
Timed in a pass: sending the words, counting from zero, collecting the popular prefixes.
"""

import argparse
import collections
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

import psutil

PACKAGES = ["ray"]
spawn = multiprocessing.get_context("spawn")


def add_arguments(add):
    add("--num-documents", type=positive, default=10, help="documents per worker")
    add("--words-per-document", type=positive, default=10000, help="words")
    add("--word-length", type=positive, default=20, help="bytes of a word")
    add("--num-warmups", type=positive, default=1, help="passes before the trials")


def make_inputs(args, num_cpus):
    """Return a tuple of one: batches of num_cpus documents, which are lists of bytes."""
    rng = random.Random(args.seed)

    def document():
        return [rng.randbytes(args.word_length) for _ in range(args.words_per_document)]

    batches = [[document() for _ in range(num_cpus)] for _ in range(args.num_documents)]
    return (batches,)


def split(documents, num_cpus):
    """Return num_cpus lists of words; a word's first byte (0 to 255) selects its list."""
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


def digest(result):
    """Return the sha256, in hexadecimal, of a set of bytes."""
    return hashlib.sha256(repr(sorted(result)).encode()).hexdigest()


@contextlib.contextmanager  # sets up, yields the function that makes a pass, tidies up
def serial(num_cpus, batches):
    counter = PrefixCounter()

    def run_pass():
        for documents in batches:
            counter.add(itertools.chain(*documents))
        return counter.pop_popular()

    yield run_pass


def add_words(counts, words):
    """Return a dict of counts with the words added; a dict pickles fastest."""
    counter = PrefixCounter(counts)
    counter.add(words)
    return dict(counter.counts)


@contextlib.contextmanager
def plain_pool(num_cpus, batches):
    with spawn.Pool(num_cpus) as pool:

        def run_pass():
            counts = [{} for _ in range(num_cpus)]
            for documents in batches:
                calls = zip(counts, split(documents, num_cpus))
                counts = pool.starmap(add_words, calls, chunksize=1)
            return set().union(*[PrefixCounter(c).pop_popular() for c in counts])

        yield run_pass


worker_counter = PrefixCounter()  # every worker has its own


def worker_add(words):
    worker_counter.add(words)


def worker_pop_popular():
    return worker_counter.pop_popular()


@contextlib.contextmanager
def tuned_pool(num_cpus, batches):
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(spawn.Pool(1)) for _ in range(num_cpus)]

        def run_pass():
            adds = []
            for documents in batches:
                for pool, words in zip(pools, split(documents, num_cpus)):
                    adds.append(pool.apply_async(worker_add, [words]))
            for add in adds:
                add.get()  # raises what the call raised
            pops = [pool.apply_async(worker_pop_popular) for pool in pools]
            return set().union(*[pop.get() for pop in pops])

        yield run_pass


@contextlib.contextmanager
def ray_actors(num_cpus, batches):
    with start_ray(num_cpus) as ray:
        actor_class = ray.remote(num_cpus=1)(PrefixCounter)
        actors = [actor_class.remote() for _ in range(num_cpus)]

        def run_pass():
            adds = []
            for documents in batches:
                for actor, words in zip(actors, split(documents, num_cpus)):
                    adds.append(actor.add.remote(words))
            ray.get(adds)  # raises what the call raised
            pops = [actor.pop_popular.remote() for actor in actors]
            return set().union(*ray.get(pops))

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
