# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["psutil>=5.9", "ray>=2.60,<3"]
# ///
"""Stateful computation: find the popular prefixes in a stream of documents.

Every proper prefix of every word is counted; one seen more than 3 times is popular.
Timed: routing, counting, merging, forgetting. Run: python stateful.py, or uv run it.

  serial                 one counter, in this process
  multiprocessing        Pool.starmap, with all counts travelling in and out of a call
  multiprocessing-tuned  a Pool of one process per worker, which keeps its counter
  ray                    an actor per worker, which is a counter
"""

import signal

if __name__ == "__main__":  # heeded from main on, as imports cannot tidy up
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])

import argparse
import collections
import concurrent.futures
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing.resource_tracker
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time

import psutil

PACKAGES, NUM_WARMUPS, same_result = ["psutil", "ray"], 1, set.__eq__
SIZES = {"num_documents": 10, "words_per_document": 10000, "word_length": 20}


def make_inputs(args, num_cpus):
    """Return batches of `num_cpus` documents, each a list of random words (bytes)."""
    draw, n = random.Random(args.seed).randbytes, args.word_length
    docs, words = range(args.num_documents), range(args.words_per_document)
    if 120 * num_cpus * len(docs) * len(words) * n > psutil.virtual_memory().available:
        raise MemoryError("no memory for the words and their counts: ask for fewer")
    if num_cpus > 256:
        print("256 first bytes keep 256 workers busy; the others idle", file=sys.stderr)
    return [[[draw(n) for _ in words] for _ in range(num_cpus)] for _ in docs], num_cpus


def route(batches, workers):
    """Yield (worker, words): the first byte decides, so no two workers share a prefix."""
    for batch in batches:
        shards = [[] for _ in workers]
        for word in itertools.chain(*batch):
            shards[word[0] % len(workers)].append(word)
        yield from zip(workers, shards)


class PrefixCounter(collections.Counter):
    """Counts of the proper prefixes of words: the state that a worker keeps."""

    def add(self, words):
        self.update(word[:i] for word in words for i in range(1, len(word)))

    def finish(self):
        popular = {prefix for prefix, count in self.items() if count > 3}
        self.clear()
        return popular


counter = PrefixCounter()  # every process has its own


# ---- serial ----
def run_serial(batches, num_cpus):
    def trial():
        counter.add(itertools.chain(*itertools.chain(*batches)))
        return counter.finish()

    yield trial


# ---- multiprocessing ----
def add_words(counter, words):
    counter.add(words)
    return counter


def run_multiprocessing(batches, num_cpus):
    def trial():
        counters = [PrefixCounter() for _ in range(num_cpus)]
        for batch in batches:
            counters = pool.starmap(add_words, route([batch], counters))
        return set().union(*(counter.finish() for counter in counters))

    with start_pool(num_cpus) as pool:
        yield trial


# ---- multiprocessing-tuned ----
def call(method, *arguments):
    return getattr(counter, method)(*arguments)


def run_multiprocessing_tuned(batches, num_cpus):
    def trial():
        calls = [p.apply_async(call, ("add", w)) for p, w in route(batches, pools)]
        calls += [pool.apply_async(call, ("finish",)) for pool in pools]
        return set().union(*[c.get() for c in calls][-num_cpus:])

    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(SPAWN.Pool(1)) for _ in range(num_cpus)]
        [pool.apply(call, ("finish",)) for pool in pools]
        yield trial


# ---- ray ----
def run_ray(batches, num_cpus):
    def trial():
        calls = [actor.add.remote(words) for actor, words in route(batches, actors)]
        calls += [actor.finish.remote() for actor in actors]
        return set().union(*ray.get(calls)[-num_cpus:])

    with start_ray(num_cpus) as ray:
        Actor = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(PrefixCounter)
        actors = [Actor.remote() for _ in range(num_cpus)]
        ray.get([actor.__ray_ready__.remote() for actor in actors])
        yield trial


# ---- timing and reporting: the same, letter for letter, in the three benchmarks ----
SCRIPT, ALIVE = os.path.basename(__file__).removesuffix(".py"), set()
NAMES = ["serial", "multiprocessing", "multiprocessing-tuned", "ray"]
RUNS = [run_serial, run_multiprocessing, run_multiprocessing_tuned, run_ray]
LIMITS = {"num_cpus": (1, 1024), "num_warmups": (0, 10**6), "seed": (0, 10**6)}
ROW = "{:22}{:7.2f}{:9.4f} ± {:.4f}{:9.4f} … {:.4f}{:>8}  {}"
SPAWN, STOP = multiprocessing.get_context("spawn"), [signal.SIGINT, signal.SIGTERM]


def start_pool(num_cpus, prepare=None, *initargs):
    """Return a Pool whose workers are up: `prepare` is given a barrier to wait at."""
    ready = SPAWN.Barrier(num_cpus + 1)
    pool = SPAWN.Pool(num_cpus, prepare or type(ready).wait, (ready, *initargs))
    ready.wait()
    return pool


@contextlib.contextmanager
def start_ray(num_cpus):
    """Yield ray, joined to the cluster of RAY_ADDRESS or `ray start`, or started here."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else `uv run` hangs
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers lack it
    options = {"num_cpus": num_cpus, "include_dashboard": False}
    options["_system_config"] = {"process_group_cleanup_enabled": False}  # one group
    options["_temp_dir"] = tempfile.gettempdir()
    address = os.environ.get("RAY_ADDRESS") or ray._private.utils.read_ray_address()
    if address:  # ray.init would try it for minutes, though nothing answers
        sys.stderr.write(f"only ray joins {address} (or unset RAY_ADDRESS, ray stop)\n")
        socket.create_connection(address.rpartition(":")[::2], 9).close()
        options = {"address": address}
    try:
        ray.init(logging_level="error", log_to_driver=False, **options)
        node, has = ray._private.worker._global_node, ray.cluster_resources
        cpus = int(has()["CPU"])
        if cpus < num_cpus:
            raise OSError(f"{num_cpus} workers, but Ray has only {cpus} CPUs")
        ALIVE.add(lambda: not node.dead_processes() and has().get("CPU", 0) >= num_cpus)
        sys.stderr = os.fdopen(os.dup(2), "w", 1)  # apart from Ray's C++ lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        yield ray  # which ends with this process
    except ray.exceptions.RayError as error:
        lost = OSError(f"ray failed, with its state: {str(error).splitlines()[-1]}")
        raise getattr(error, "cause", lost) from error


def measure(folder, name, args, num_cpus, reference):
    """Return set-up seconds, the trials' seconds, and the result that all passes gave."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    tempfile.tempdir, over = folder, threading.Event()

    def watch():  # as Pool.map would wait for ever for a worker that died
        while not over.wait(0.5):
            ALIVE.update(p.is_alive for p in multiprocessing.active_children())
            if not all(is_alive() for is_alive in ALIVE):
                os.killpg(0, signal.SIGKILL)

    ALIVE.add(multiprocessing.parent_process().is_alive)
    threading.Thread(target=watch, daemon=True).start()
    data, run = make_inputs(args, num_cpus), RUNS[NAMES.index(name)]
    start, seconds = time.perf_counter(), []
    with contextlib.contextmanager(run)(*data) as trial, contextlib.ExitStack() as end:
        end.callback(over.set)
        setup_seconds = time.perf_counter() - start
        for number in range(args.num_warmups + args.num_trials):
            if sys.stderr.isatty():
                print(f"{name}: pass {number + 1}\033[K", end="\r", file=sys.stderr)
            start = time.perf_counter()
            result, stop = trial(), time.perf_counter()  # before the last one is freed
            seconds.append(stop - start)
            reference = result if reference is None else reference
            if not same_result(result, reference):
                raise OSError(f"{name} differs from the first implementation's result")
    return setup_seconds, seconds[args.num_warmups :], reference


def run_apart(name, *arguments):
    """Return what measure returns, run in a process group, which is killed in the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    folder = tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)
    with folder, concurrent.futures.ProcessPoolExecutor(1, SPAWN, os.setpgrp) as runner:
        future = runner.submit(measure, folder.name, name, *arguments)
        [driver] = multiprocessing.active_children()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
            return future.result()
        except concurrent.futures.BrokenExecutor as error:
            raise ChildProcessError(f"{name}: a process died; run it again") from error
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
            driver.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)


def main():
    """Run what the flags ask for; print a table per worker count, or JSON lines."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    cores = min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = lambda message: parser.exit(2, f"{SCRIPT}.py: error: {message}\n")
    add = parser.add_argument
    add("--implementations", nargs="+", choices=NAMES, default=NAMES, help="to run")
    add("--num-cpus", nargs="+", type=int, default=[cores], help="workers; a sweep")
    add("--num-trials", type=int, default=5, help="timed trials")
    add("--num-warmups", type=int, default=NUM_WARMUPS, help="untimed passes before")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--json", action="store_true", help="print JSON lines; tables go to stderr")
    for k, v in SIZES.items():
        add("--" + k.replace("_", "-"), type=type(v), default=v, help="of the workload")
    args, table, stdout = parser.parse_args(), {}, sys.stdout
    for name, value in [*vars(args).items(), *(("num_cpus", n) for n in args.num_cpus)]:
        low, high = LIMITS.get(name, (1, 10**6))
        if type(value) is int and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    if len({*args.implementations}) < len(args.implementations):
        parser.error("--implementations names one twice")
    environment = {"physical_cores": cores, "platform": " ".join(os.uname()[::2])}
    environment |= {name: importlib.metadata.version(name) for name in PACKAGES}
    environment["python"] = sys.version.split()[0]
    parameters = {name: getattr(args, name) for name in ["seed", *SIZES]}
    details = ", ".join(f"{k} {v}" for k, v in {**parameters, **environment}.items())
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # after a kill
    for number in STOP:
        signal.signal(number, lambda *_: sys.exit(130))
    multiprocessing.resource_tracker.ensure_running()  # which unblocks STOP, but once
    sys.stdout = sys.stderr if args.json else stdout
    for num_cpus in args.num_cpus:
        print(f"{__doc__.splitlines()[0]} {num_cpus} workers, {args.num_trials} trials")
        print(f"after {args.num_warmups} warm-ups, {details}\n", flush=True)
        print(f"{'seconds':22} set-up       mean ± std        min … max  speedup")
        reference, means = None, table.setdefault(num_cpus, {})
        for name in sorted(args.implementations, key=NAMES.index):
            setup, seconds, reference = run_apart(name, args, num_cpus, reference)
            mean = means[name] = statistics.mean(seconds)
            std = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
            speedup = means["serial"] / mean if "serial" in means else None
            ends = min(seconds), max(seconds), f"{speedup:.2f}x" if speedup else ""
            bar = "█" * round(5 * mean / next(iter(means.values())))
            note = " varies over 10%: raise --num-trials" if std > 0.1 * mean else ""
            print(ROW.format(name, setup, mean, std, *ends, bar + note), flush=True)
            record = {"benchmark": SCRIPT, "implementation": name, "num_cpus": num_cpus}
            record |= {"setup_seconds": setup, "trial_seconds": seconds}
            record |= {"mean_seconds": mean, "std_seconds": std, "speedup": speedup}
            record |= {"parameters": parameters, "environment": environment}
            if args.json:
                print(json.dumps(record), file=stdout, flush=True)
        best, *others = sorted(means, key=means.get)
        ratios = [f", {means[k] / means[best]:.2f}x as fast as {k}" for k in others]
        print(f"Fastest: {best}", *ratios, ". All results agree.\n", sep="")
    if len(table) > 1:
        print("workers", *(f"{name:>21}" for name in means), " mean s; the work grows")
        for num_cpus, means in table.items():
            print(f"{num_cpus:7}", *(f"{mean:21.4f}" for mean in means.values()))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # as in `| head -1`
        os._exit(1)
    except (OSError, MemoryError) as error:
        sys.exit(f"{SCRIPT}.py: error: {error}")
