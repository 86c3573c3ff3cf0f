# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.60,<3", "tensorflow>=2.18,<3"]
# ///
"""Expensive initialization: classify images with a model that takes long to load.

save_model.py makes the model and the images; run it first.

  serial                 loads once, in this process; TensorFlow uses every core
  multiprocessing        Pool.map, which keeps nothing: every call loads
  multiprocessing-tuned  a Pool whose initializer loads, once in every process
  ray                    an actor per worker, which loads when it starts

Run: python expensive_init.py; with nothing but uv installed, uv run expensive_init.py.
Timed: shipping batches (as slices of the images), classifying, collecting labels.
Set-up, importing TensorFlow and loading, is timed apart. Not timed: comparing results.
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
from multiprocessing import connection

if __name__ == "__main__":  # Ctrl-C waits until main() can end the run cleanly
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import numpy as np
import psutil

PACKAGES = ["numpy", "psutil", "ray", "tensorflow"]
WORK = "per worker {num_batches} batches of {batch_size} images"
FOLDER = os.path.dirname(os.path.abspath(__file__))
SIZES = {
    "--num-batches": (10, "per worker"),
    "--batch-size": (10000, "images"),
    "--model-path": (os.path.join(FOLDER, "model.keras"), "made by save_model.py"),
    "--images-path": (os.path.join(FOLDER, "images.npy"), "made by save_model.py"),
}
NUM_WARMUPS = 1
same_result = np.array_equal


def make_inputs(args, num_cpus):
    """Return the batches, random slices of the images, and what every worker needs."""
    spare = len(load_images(args.images_path)) - args.batch_size
    if spare < 0:
        sys.exit(f"{ERROR} {args.images_path} has {-spare} images less than a batch")
    rng = np.random.default_rng(args.seed)
    starts = rng.integers(0, spare + 1, num_cpus * args.num_batches).tolist()
    batches = [slice(start, start + args.batch_size) for start in starts]
    return batches, num_cpus, args.model_path, args.images_path


def load_images(path):
    """Return the uint8 images (N, 28, 28) in `path`; raise OSError if there are none."""
    try:
        images = np.load(path)
        if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
            raise ValueError("no uint8 images of 28 x 28")
    except (OSError, EOFError, ValueError, AttributeError) as error:
        where = f"{path} on {platform.node()}"
        raise OSError(f"{where}: {error}; run save_model.py there") from error
    return images


class Classifier:
    """A model and images, expensive to load. Raises OSError if they cannot be used."""

    def __init__(self, model_path, images_path, num_threads):
        self.images = load_images(images_path)
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # or each process claims every GPU
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors become exceptions
        saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)  # the lines written before TensorFlow heeds its log level
        try:
            import tensorflow as tf
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(sink)
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
        tf.get_logger().setLevel("ERROR")  # it warns of the loading in every call
        try:
            self.model = tf.keras.models.load_model(model_path)
            if self.model.input_shape != (None, 28, 28):
                raise ValueError("it takes no images of 28 x 28")
        except Exception as error:
            node, why = platform.node(), str(error).partition("\n")[0].strip(".")
            problem = f"{model_path} on {node}: {why}; run save_model.py there"
            raise OSError(problem) from error

    def classify(self, batch):
        """Return the labels of the images in the slice `batch`, int64 (batch_size,)."""
        return self.model.predict_on_batch(self.images[batch]).argmax(axis=1)


# ---- serial ----
def run_serial(batches, num_cpus, *paths):
    classifier = Classifier(*paths, 0)  # 0: as many threads as TensorFlow likes

    def trial():
        return [classifier.classify(batch) for batch in batches]

    yield trial


# ---- multiprocessing ----
def load_and_classify(arguments, batch):
    return Classifier(*arguments).classify(batch)


def run_multiprocessing(batches, num_cpus, *paths):
    with start_pool("multiprocessing", num_cpus) as pool:
        function = functools.partial(load_and_classify, (*paths, 1))

        def trial():
            return pool.map(function, batches, chunksize=1)

        yield trial


# ---- multiprocessing-tuned ----
get_classifier = functools.cache(Classifier)  # one per process


def load_early(ready, *arguments):
    # A Pool replaces for ever a worker that fails here; a task will raise it again.
    with contextlib.suppress(OSError):
        get_classifier(*arguments)
    ready.wait()


def classify(arguments, batch):
    return get_classifier(*arguments).classify(batch)


def run_multiprocessing_tuned(batches, num_cpus, *paths):
    with start_pool("multiprocessing-tuned", num_cpus, load_early, *paths, 1) as pool:
        function = functools.partial(classify, (*paths, 1))

        def trial():
            return pool.map(function, batches, chunksize=1)

        yield trial


# ---- ray ----
def run_ray(batches, num_cpus, *paths):
    with start_ray(num_cpus) as ray:
        # A killed actor starts again, loads its model again and repeats its batch.
        options = {"num_cpus": 1, "max_restarts": 3, "max_task_retries": 3}
        actor_class = ray.remote(scheduling_strategy="SPREAD", **options)(Classifier)
        actors = [actor_class.remote(*paths, 1) for _ in range(num_cpus)]
        ray.get([actor.__ray_ready__.remote() for actor in actors])

        def trial():
            calls = []
            for number, batch in enumerate(batches):
                calls.append(actors[number % num_cpus].classify.remote(batch))
            return ray.get(calls)

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
