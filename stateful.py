# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["psutil>=5.9", "ray>=2.9,<3"]
# ///
# SPDX-License-Identifier: MIT-0
"""Stateful computation: count prefixes with serial Python, multiprocessing and Ray.

  serial                 adds all words to one counter
  multiprocessing_naive  sends the counts into every call, and back
  multiprocessing_tuned  keeps the counts in a Pool of one process per worker
  ray_naive              sends the counts into every call, and back
  ray_tuned              keeps the counts in an actor per worker

Each function starts its workers, then loops `for _ in passes`, which times each pass:
send the words, count, collect the popular prefixes. The first pass includes the start.

To reuse a function, copy it and what it uses. Call it with range(1) as passes, under
`if __name__ == "__main__":`. To start Ray, use ray.init("local", num_cpus=num_cpus).

Run `python stateful.py` or `uv run stateful.py`. Ray starts on this machine, or joins
the cluster at RAY_ADDRESS if set.
"""

import argparse
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import threading
import time

import psutil

TITLE = "Stateful computation: find the popular prefixes in a stream of documents"
mp = multiprocessing.get_context("spawn")  # forking beside threads can hang


def add_arguments(parser):
    parser.add_argument("--num-documents", type=int, default=10, help="per worker")
    parser.add_argument("--words-per-document", type=int, default=2000, help="words")
    parser.add_argument("--word-length", type=int, default=20, help="bytes per word")


def make_inputs(args):
    """Return [batches]; a batch is num_cpus documents, each a list of random words."""
    rng = random.Random(args.seed)

    def make_document():
        return [rng.randbytes(args.word_length) for _ in range(args.words_per_document)]

    batches = []
    for _ in range(args.num_documents):
        batches.append([make_document() for _ in range(args.num_cpus)])
    return [batches]


def freeze(popular):
    """Return the set of popular prefixes, for comparison."""
    return frozenset(popular)


def split(documents, num_cpus):
    """Return num_cpus lists of words; those that share a prefix are in the same list."""
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


def serial(passes, num_cpus, batches):
    counter = PrefixCounter()
    for _ in passes:
        for documents in batches:
            counter.add(itertools.chain(*documents))
        popular = counter.pop_popular()
    return popular


def add_words(counts, words):
    """Return the counts, a dict, with the words' prefixes added."""
    counter = PrefixCounter(counts)
    counter.add(words)
    return dict(counter.counts)  # pickles faster than a Counter


def multiprocessing_naive(passes, num_cpus, batches):
    with mp.Pool(num_cpus) as pool:
        for _ in passes:
            counts = [{} for _ in range(num_cpus)]
            for documents in batches:
                shares = split(documents, num_cpus)
                counts = pool.starmap(add_words, zip(counts, shares))
            popular = set().union(*[PrefixCounter(c).pop_popular() for c in counts])
    return popular


def init_counter():  # runs once in each worker
    global worker_counter
    worker_counter = PrefixCounter()


def worker_add(words):
    worker_counter.add(words)


def worker_pop_popular():
    return worker_counter.pop_popular()


def multiprocessing_tuned(passes, num_cpus, batches):
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(mp.Pool(1, init_counter)) for _ in range(num_cpus)]
        for _ in passes:
            adds = []
            for documents in batches:
                for pool, words in zip(pools, split(documents, num_cpus)):
                    adds.append(pool.apply_async(worker_add, [words]))
            for add in adds:
                add.get()  # raises what the call raised
            pops = [pool.apply_async(worker_pop_popular) for pool in pools]
            popular = set().union(*[pop.get() for pop in pops])
    return popular


def ray_naive(passes, num_cpus, batches):
    import ray  # not at the top, as a Pool's workers import this file, too

    with ray.init(**ray_options(num_cpus)):
        task = ray.remote(add_words)
        for _ in passes:
            counts = [{} for _ in range(num_cpus)]
            for documents in batches:
                shares = split(documents, num_cpus)
                counts = ray.get([task.remote(c, s) for c, s in zip(counts, shares)])
            popular = set().union(*[PrefixCounter(c).pop_popular() for c in counts])
    return popular


def ray_tuned(passes, num_cpus, batches):
    import ray

    with ray.init(**ray_options(num_cpus)):
        actor_class = ray.remote(num_cpus=1)(PrefixCounter)  # one actor per CPU
        actors = [actor_class.remote() for _ in range(num_cpus)]
        for _ in passes:
            adds = []
            for documents in batches:
                for actor, words in zip(actors, split(documents, num_cpus)):
                    adds.append(actor.add.remote(words))
            ray.get(adds)  # raises what the call raised
            pops = [actor.pop_popular.remote() for actor in actors]
            popular = set().union(*ray.get(pops))
    return popular


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
