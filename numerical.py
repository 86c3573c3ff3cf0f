# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.60,<3", "scipy>=1.12,<2"]
# ///
"""Numerical data: filter one image with one random filter per worker.

Each trial ships the image anew, as in a program where the next one has just arrived.

  serial                 the filters one after the other, in this process
  multiprocessing        Pool.map, which pickles the image once per filter
  multiprocessing-tuned  the image in shared memory, which every worker maps once
  ray                    ray.put stores the image once; every task maps it, uncopied

Run: python numerical.py, or, with nothing installed but uv, uv run numerical.py.
Timed: shipping the image, filtering, collecting the subsamples. Set-up is timed apart.
Not timed: making the inputs, comparing the results.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing import connection, shared_memory

if __name__ == "__main__":  # Ctrl-C waits until main() can end the run cleanly
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import numpy as np
import psutil
import scipy

PACKAGES = ["numpy", "psutil", "ray", "scipy"]
WORK = (
    "one {image_size} x {image_size} image, a {filter_size} x {filter_size} filter each"
)
SIZES = {"--image-size": (3000, "pixels a side"), "--filter-size": (4, "pixels a side")}
NUM_WARMUPS = 5  # Ray's object store takes about five to reach its steady speed
same_result = np.array_equal


def make_inputs(args, num_cpus):
    """Return a float64 image (size, size) and filters (num_cpus, k, k), all in [0, 1)."""
    if 16 * args.image_size**2 > psutil.virtual_memory().available:
        sys.exit(f"{ERROR} no memory for image and convolution: lower --image-size")
    rng = np.random.default_rng(args.seed)
    image = rng.random((args.image_size, args.image_size))
    return image, rng.random((num_cpus, args.filter_size, args.filter_size))


def filter_image(image, image_filter):
    """Convolve a float64 image with a filter; return every fifth pixel, both ways."""
    # Contiguous: a strided view is copied into the pickle, and Ray could not map it.
    return np.ascontiguousarray(scipy.signal.convolve2d(image, image_filter)[::5, ::5])


# ---- serial ----
def run_serial(image, filters):
    def trial():
        return [filter_image(image, image_filter) for image_filter in filters]

    yield trial


# ---- multiprocessing ----
def run_multiprocessing(image, filters):
    with start_pool("multiprocessing", len(filters)) as pool:

        def trial():
            return pool.map(functools.partial(filter_image, image), filters)

        yield trial


# ---- multiprocessing-tuned ----
def map_image(ready, name, shape):
    global block, shared_image  # the image lives as long as the block
    block = shared_memory.SharedMemory(name)
    shared_image = np.ndarray(shape, buffer=block.buf)
    ready.wait()


def filter_shared_image(image_filter):
    return filter_image(shared_image, image_filter)


def run_multiprocessing_tuned(image, filters):
    name, num_cpus = "multiprocessing-tuned", len(filters)
    block = shared_memory.SharedMemory(create=True, size=image.nbytes)
    shared_image = np.ndarray(image.shape, buffer=block.buf)
    try:
        with start_pool(name, num_cpus, map_image, block.name, image.shape) as pool:

            def trial():
                shared_image[:] = image
                return pool.map(filter_shared_image, filters)

            yield trial
    finally:
        block.unlink()


# ---- ray ----
def run_ray(image, filters):
    with start_ray(len(filters)) as ray:
        filter_task = ray.remote(scheduling_strategy="SPREAD")(filter_image)

        def trial():
            image_ref = ray.put(image)
            return ray.get([filter_task.remote(image_ref, f) for f in filters])

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
