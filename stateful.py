# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["psutil>=5.9", "ray>=2.60,<3"]
# ///
"""Stateful computation: find the popular prefixes in a stream of documents.

Every proper prefix of every word is counted; one seen more than 3 times is popular. A
word goes to the worker that its first byte names, so each worker owns its prefixes and
the union of their answers is exact.

  serial                 one counter, in this process
  multiprocessing        Pool.starmap, with all counts travelling in and out of a call
  multiprocessing-tuned  a counter per process, and a queue that feeds it
  ray                    an actor per worker, which is a counter

Run: python stateful.py, or, with nothing installed but uv, uv run stateful.py.
Timed: routing and shipping the words, counting, merging the answers, and freeing the
counts. Set-up is timed apart. Not timed: making the inputs, comparing the results.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing import connection

if __name__ == "__main__":  # Ctrl-C waits until main() can end the run cleanly
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import psutil

PACKAGES = ["psutil", "ray"]
WORK = "per worker {num_documents} documents of {words_per_document} {word_length}-byte words"
SIZES = {
    "--num-documents": (10, "per worker"),
    "--words-per-document": (10000, "words"),
    "--word-length": (20, "bytes"),
}
NUM_WARMUPS = 1
same_result = set.__eq__


def make_inputs(args, num_cpus):
    """Return `num_documents` batches of `num_cpus` documents, each a list of words."""
    num_words = args.num_documents * args.words_per_document * num_cpus
    if 120 * num_words * args.word_length > psutil.virtual_memory().available:
        sys.exit(f"{ERROR} no memory for {num_words} words and counts: ask for fewer")
    if num_cpus > 256:
        print("256 first bytes keep 256 workers busy; the others idle", file=sys.stderr)
    rng = random.Random(args.seed)
    words, length = range(args.words_per_document), args.word_length
    workers, batches = range(num_cpus), range(args.num_documents)
    documents = [
        [[rng.randbytes(length) for _ in words] for _ in workers] for _ in batches
    ]
    return documents, num_cpus


def route(batch, num_cpus):
    """Return a list of words per worker; prefixes of a word share its first byte."""
    shards = [[] for _ in range(num_cpus)]
    for document in batch:
        for word in document:
            shards[word[0] % num_cpus].append(word)
    return shards


class PrefixCounter:
    """Counts the proper prefixes of words: the state that a worker keeps."""

    def __init__(self):
        self.counts = collections.Counter()

    def add(self, words):
        self.counts.update(word[:i] for word in words for i in range(1, len(word)))

    def popular(self):
        return {prefix for prefix, count in self.counts.items() if count > 3}

    def reset(self):
        self.counts.clear()


# ---- serial ----
def run_serial(batches, num_cpus):
    def trial():
        counter = PrefixCounter()
        for batch in batches:
            for document in batch:
                counter.add(document)
        return counter.popular()

    yield trial


# ---- multiprocessing ----
def add_words(counter, words):
    counter.add(words)
    return counter


def run_multiprocessing(batches, num_cpus):
    with start_pool("multiprocessing", num_cpus) as pool:

        def trial():
            counters = [PrefixCounter() for _ in range(num_cpus)]
            for batch in batches:
                pairs = zip(counters, route(batch, num_cpus))
                counters = pool.starmap(add_words, pairs)
            return set().union(*(counter.popular() for counter in counters))

        yield trial


# ---- multiprocessing-tuned ----
def keep_queues(ready, *given):
    global queues  # a queue can be given to a new process, not to a task
    queues = given
    threading.Thread(target=exit_with_parent, daemon=True).start()
    ready.wait()


def exit_with_parent():  # a killed parent leaves no end of file in a queue
    multiprocessing.parent_process().join()
    os._exit(1)


def count_queue(index):
    counter = PrefixCounter()
    for words in iter(queues[index].get, None):
        counter.add(words)
    return counter.popular()


def run_multiprocessing_tuned(batches, num_cpus):
    spawn = multiprocessing.get_context("spawn")
    queues = [spawn.Queue() for _ in range(num_cpus)]
    for queue in queues:
        queue.cancel_join_thread()  # or words that no worker takes would block our exit
    with start_pool("multiprocessing-tuned", num_cpus, keep_queues, *queues) as pool:

        def trial():
            answers = pool.map_async(count_queue, range(num_cpus), chunksize=1)
            for batch in batches:
                for queue, words in zip(queues, route(batch, num_cpus)):
                    queue.put(words)
            for queue in queues:
                queue.put(None)
            return set().union(*answers.get())

        yield trial


# ---- ray ----
def run_ray(batches, num_cpus):
    with start_ray(num_cpus) as ray:
        options = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        actor_class = ray.remote(**options)(PrefixCounter)
        actors = [actor_class.remote() for _ in range(num_cpus)]
        ray.get([actor.__ray_ready__.remote() for actor in actors])

        def trial():
            calls = [actor.reset.remote() for actor in actors]
            for batch in batches:
                for actor, words in zip(actors, route(batch, num_cpus)):
                    calls.append(actor.add.remote(words))
            ray.get(calls)  # raises here what went wrong there
            return set().union(*ray.get([actor.popular.remote() for actor in actors]))

        yield trial


# ---- timing and reporting: the same, letter for letter, in the three benchmarks ----
IMPLEMENTATIONS = {
    "serial": run_serial,
    "multiprocessing": run_multiprocessing,
    "multiprocessing-tuned": run_multiprocessing_tuned,
    "ray": run_ray,
}
LIMITS = {"num_cpus": (1, 1024), "num_warmups": (0, 10**6), "seed": (0, 10**6)}
SCRIPT = os.path.basename(__file__)
ERROR = f"{SCRIPT}: error:"


@contextlib.contextmanager
def start_pool(name, num_cpus, initializer=threading.Barrier.wait, *initargs):
    """Yield a Pool whose workers are up: `initializer` waits at the barrier it gets."""
    spawn = multiprocessing.get_context("spawn")
    ready, closing = spawn.Barrier(num_cpus + 1), threading.Event()

    def watch():  # Pool.map would wait for ever for a worker that died
        connection.wait([worker.sentinel for worker in workers])
        if not closing.is_set():
            print(f"{ERROR} {name}: a worker died; run again", file=sys.stderr)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            time.sleep(5)  # closing a Pool hangs if the dead worker held a lock of it
            for worker in multiprocessing.active_children():
                worker.kill()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    # The workers inherit the blocked signal: Ctrl-C is for the main process alone.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    with spawn.Pool(num_cpus, initializer, (ready, *initargs)) as pool:
        workers = multiprocessing.active_children()
        threading.Thread(target=watch, daemon=True).start()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            ready.wait()
            yield pool
        finally:
            closing.set()


@contextlib.contextmanager
def start_ray(num_cpus):
    """Join the cluster of RAY_ADDRESS or `ray start`, else start Ray on this machine."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else `uv run` hangs
    import ray
    from ray._private.utils import read_ray_address

    address = os.environ.get("RAY_ADDRESS") or read_ray_address()
    on_sigterm, folder = signal.getsignal(signal.SIGTERM), tempfile.mkdtemp(dir="/tmp")
    options = {"num_cpus": num_cpus, "include_dashboard": False, "_temp_dir": folder}
    # Ray prints there what it says as an exception, too.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            if address:
                print(f"joining the Ray cluster at {address}", file=sys.stderr)
                try:  # ray.init would try a dead address for three minutes
                    socket.create_connection(address.rsplit(":", 1), timeout=9).close()
                except (OSError, ValueError):
                    sys.exit(f"{ERROR} it does not answer: unset RAY_ADDRESS, ray stop")
                options = {"address": address}
            ray.init(logging_level="error", log_to_driver=False, **options)
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there
            cpus, here = int(ray.cluster_resources()["CPU"]), os.cpu_count()
            if cpus < num_cpus:
                sys.exit(f"{ERROR} {num_cpus} workers, but Ray has only {cpus} CPUs")
            if address and cpus > here:
                print(f"ray can use {cpus} CPUs, the others {here}", file=sys.stderr)
            yield ray
        except ray.exceptions.RayTaskError:
            raise  # the workload's own error
        except ray.exceptions.RayError as error:
            why, died, _ = str(error).splitlines()[-1].partition(". Worker exit type")
            sys.exit(f"{ERROR} ray: {why}{', and its state is lost' if died else ''}")
        finally:
            ray.shutdown(wait_for_processes=True)
            while os.path.exists(folder):  # workers still write their last logs
                shutil.rmtree(folder, ignore_errors=True)


def compare(args, num_cpus, facts):
    """Run each implementation, check every result, yield its record (see --json)."""
    inputs, reference, serial_mean = make_inputs(args, num_cpus), None, None
    for name in args.implementations:
        implementation = contextlib.contextmanager(IMPLEMENTATIONS[name])
        seconds = []
        start = time.perf_counter()
        with implementation(*inputs) as trial:
            setup_seconds = time.perf_counter() - start
            for number in range(args.num_warmups + args.num_trials):
                if sys.stderr.isatty():
                    print(f"{name}: pass {number + 1}\033[K", end="\r", file=sys.stderr)
                start = time.perf_counter()
                result = trial()
                seconds.append(time.perf_counter() - start)
                reference = result if reference is None else reference
                if not same_result(result, reference):
                    sys.exit(f"{ERROR} {name} differs from {args.implementations[0]}")
                del result  # or freeing it would count in the next trial
        del seconds[: args.num_warmups]
        mean = statistics.mean(seconds)
        serial_mean = mean if name == "serial" else serial_mean
        yield {
            "benchmark": SCRIPT.removesuffix(".py"),
            "implementation": name,
            "num_cpus": num_cpus,
            "setup_seconds": setup_seconds,
            "trial_seconds": seconds,
            "mean_seconds": mean,
            "std_seconds": statistics.stdev(seconds) if len(seconds) > 1 else 0.0,
            "speedup": serial_mean and serial_mean / mean,
            **facts,
        }


def print_table(records):
    """Print a row per implementation, in seconds, and who is how much faster."""
    ranking = sorted(records, key=lambda record: record["mean_seconds"])
    print(f"{'seconds':22}{'set-up':>7}{'mean ± std':>17}{'min … max':>17}  speedup")
    for r in records:
        name, mean, seconds = r["implementation"], r["mean_seconds"], r["trial_seconds"]
        row = f"{name:22}{r['setup_seconds']:7.2f}{mean:9.4f} ± {r['std_seconds']:.4f}"
        row += f"{min(seconds):9.4f} … {max(seconds):.4f}"
        row += f"{r['speedup']:8.2f}x  " if r["speedup"] else 11 * " "
        print(row + "█" * round(12 * mean / ranking[-1]["mean_seconds"]))
    for r in records:
        if r["std_seconds"] > 0.1 * r["mean_seconds"]:
            what = "varies by over 10%: close other programs or raise --num-trials"
            print(f"{r['implementation']} {what}")
    best, best_mean = ranking[0]["implementation"], ranking[0]["mean_seconds"]
    for r in ranking[1:]:
        ratio = r["mean_seconds"] / best_mean
        print(f"{best} is {ratio:.2f}x as fast as {r['implementation']}")
    print("All results agree.\n")


def main():
    """Read the flags, run the implementations, print tables or JSON lines."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count()  # None in some containers
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = lambda message: parser.exit(2, f"{ERROR} {message}\n")
    add, names = parser.add_argument, list(IMPLEMENTATIONS)
    add("--implementations", nargs="+", choices=names, default=names, help="to run")
    add("--num-cpus", nargs="+", type=int, default=[cores], help="workers; a sweep")
    add("--num-trials", type=int, default=5, help="timed trials")
    add("--num-warmups", type=int, default=NUM_WARMUPS, help="untimed passes before")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--json", action="store_true", help="print JSON lines instead of tables")
    sizes = [
        add(flag, type=type(default), default=default, help=text).dest
        for flag, (default, text) in SIZES.items()
    ]
    args = parser.parse_args()
    for name, value in [*vars(args).items(), *(("num_cpus", n) for n in args.num_cpus)]:
        low, high = LIMITS.get(name, (1, 10**6))
        if type(value) is int and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    if len({*args.implementations}) < len(args.implementations):
        parser.error("--implementations names one twice")
    # Serial first, as speedups refer to it.
    args.implementations = sorted(args.implementations, key=names.index)
    environment = {"python": platform.python_version(), "platform": platform.platform()}
    environment |= {name: importlib.metadata.version(name) for name in PACKAGES}
    environment["physical_cores"] = cores
    parameters = {name: getattr(args, name) for name in ["seed", *sizes]}
    facts = {"parameters": parameters, "environment": environment}
    work = WORK.format(**vars(args))
    versions = ", ".join(f"{key} {value}" for key, value in environment.items())
    sweep = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for num_cpus in args.num_cpus:
            if not args.json:
                print(f"{work}; {num_cpus} workers on {cores} physical cores")
                passes = f"{args.num_trials} trials after {args.num_warmups} warm-ups"
                print(f"{passes}; {versions}\n", flush=True)
            sweep[num_cpus] = []
            for record in compare(args, num_cpus, facts):
                sweep[num_cpus].append(record)
                if args.json:
                    print(json.dumps(record), flush=True)
            if not args.json:
                print_table(sweep[num_cpus])
        if len(sweep) > 1 and not args.json:
            print("mean seconds; the work grows with the number of workers")
            print("workers", *(f"{name:>22}" for name in args.implementations))
            for num_cpus, records in sweep.items():
                print(f"{num_cpus:7}", *(f"{r['mean_seconds']:22.4f}" for r in records))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:
        sys.exit(f"{ERROR} {getattr(error, 'cause', error)}")


if __name__ == "__main__":
    main()
