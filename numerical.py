# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["numpy>=1.26,<3", "psutil>=5.9", "ray>=2.60,<3", "scipy>=1.12,<2"]
# ///
"""Numerical data: filter one image with one random filter per worker.

  serial                 one filter after the other, in one process
  multiprocessing        Pool.starmap, which pickles the image for every filter
  multiprocessing-tuned  the image in shared memory, which every worker maps once
  ray                    the image in Ray's object store, which every task maps

Run: python numerical.py (uv run numerical.py does it with nothing installed but uv).
Timed: shipping the image, filtering, collecting the results. Set-up is timed apart.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing.resource_tracker
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
import scipy.signal

PACKAGES = ["numpy", "ray", "scipy"]
NUM_WARMUPS = 5  # Ray's object store takes about five to reach its steady speed
SIZES = {"image_size": (3000, "pixels a side"), "filter_size": (4, "pixels a side")}


def make_inputs(num_cpus, seed, image_size, filter_size):
    """Return a float64 image, and one float64 filter per worker as an array (N, k, k)."""
    rng = np.random.default_rng(seed)
    image = rng.random((image_size, image_size))
    filters = rng.random((num_cpus, filter_size, filter_size))
    return image, filters


def filter_image(image, image_filter):
    """Convolve a float64 image with a filter; return every fifth pixel, both ways."""
    filtered = scipy.signal.convolve2d(image, image_filter)[::5, ::5]
    # Ray maps a contiguous array; a strided view is pickled and copied.
    return np.ascontiguousarray(filtered)


def digest(result):
    """Return the sha256, in hexadecimal, of a list of arrays of equal shape."""
    return hashlib.sha256(np.stack(result).tobytes()).hexdigest()


def set_up_serial(image, filters):
    def trial():
        return [filter_image(image, f) for f in filters]

    return trial


def set_up_multiprocessing(image, filters):
    pool = start_pool(len(filters))

    def trial():
        return pool.starmap(filter_image, [(image, f) for f in filters])

    return trial


def keep_image(block, shape):
    """Keep the shared image for all calls to a worker, which runs this as it starts."""
    global shared_image
    shared_image = np.frombuffer(block).reshape(shape)


def filter_shared_image(image_filter):
    return filter_image(shared_image, image_filter)


def set_up_multiprocessing_tuned(image, filters):
    block = multiprocessing.RawArray("d", image.size)
    block_image = np.frombuffer(block).reshape(image.shape)
    pool = start_pool(len(filters), keep_image, (block, image.shape))

    def trial():
        block_image[:] = image
        return pool.map(filter_shared_image, filters)

    return trial


def set_up_ray(image, filters):
    ray = start_ray(len(filters))
    filter_task = ray.remote(filter_image)

    def trial():
        image_ref = ray.put(image)
        return ray.get([filter_task.remote(image_ref, f) for f in filters])

    return trial


IMPLEMENTATIONS = {
    "serial": set_up_serial,
    "multiprocessing": set_up_multiprocessing,
    "multiprocessing-tuned": set_up_multiprocessing_tuned,
    "ray": set_up_ray,
}


# ---- From here on the same in the three scripts: start workers, measure, report ----
TITLE = __doc__.splitlines()[0]
HEADER = "times in seconds       set-up     mean ± std      min … max     speedup"
JOINS_CLUSTER = os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def start_pool(num_cpus, initializer=None, initargs=()):
    """Return a Pool that has answered a call; its process ends, so nobody closes it."""
    pool = multiprocessing.get_context("spawn").Pool(num_cpus, initializer, initargs)
    pool.map(abs, range(num_cpus))
    return pool


def start_ray(num_cpus):
    """Return the ray module, after it joined a cluster or started Ray on this machine."""
    # Workers shall have this script's packages under `uv run`, and stay in its group.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "0")
    import ray

    if JOINS_CLUSTER:
        ray.init()
    else:
        ray.init("local", num_cpus=num_cpus, include_dashboard=False)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if num_cpus > cpus:
        sys.exit(f"Ray has {cpus} CPUs for {num_cpus} workers: lower --num-cpus")
    return ray


def watch(script_pid):
    """Kill this process group once the script, or any worker of a Pool, is dead."""
    workers = set()
    while os.getppid() == script_pid and all(w.is_alive() for w in workers):
        workers.update(multiprocessing.active_children())
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)


def measure(args, parameters):
    """Run the one implementation in args; print a JSON line for set-up and each pass."""
    # Ray writes to stdout, too, so the results keep a descriptor to themselves.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Outside the group and deaf to SIGHUP, the tracker frees a killed Pool's semaphores.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    multiprocessing.resource_tracker.ensure_running()
    os.setpgrp()
    threading.Thread(target=watch, args=[args.script_pid], daemon=True).start()
    try:
        inputs = make_inputs(args.num_cpus[0], **parameters)
        start = time.perf_counter()
        trial = IMPLEMENTATIONS[args.implementations[0]](*inputs)
        print(json.dumps({"setup_seconds": time.perf_counter() - start}), file=results)
    except SystemExit as mistake:
        print(json.dumps({"mistake": str(mistake)}), file=results)
        raise
    for _ in range(args.num_warmups + args.num_trials):
        start = time.perf_counter()
        result = trial()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "sha256": digest(result)}), file=results)


def run(name, num_cpus, num_passes):
    """Measure an implementation in a child process; return the child's JSON lines."""
    command = [sys.executable, __file__, *sys.argv[1:], "--implementations", name]
    command += ["--num-cpus", str(num_cpus), "--script-pid", str(os.getpid())]
    records = []
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        for line in itertools.islice(child.stdout, 1 + num_passes):
            records.append(json.loads(line))
            if "mistake" in records[-1]:
                sys.exit(f"{name}: {records[-1]['mistake']}")
            if sys.stderr.isatty():
                print(f"{name}: pass {len(records)}", end="\r", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):  # it died before it led a group
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if len(records) <= num_passes:
            log.seek(0)
            sys.exit(f"{log.read()}{name} failed: a process died, or raised the above")
    return records


def compare(args, parameters):
    """Print a table for every worker count and, with --json, a line for every row."""
    names = [name for name in IMPLEMENTATIONS if name in args.implementations]
    environment = {"python": platform.python_version(), "platform": platform.platform()}
    environment["physical_cores"] = psutil.cpu_count(logical=False)
    environment |= {name: importlib.metadata.version(name) for name in PACKAGES}
    facts = ", ".join(f"{k} {v}" for k, v in (parameters | environment).items())
    table = sys.stderr if args.json else sys.stdout
    table.reconfigure(errors="replace")  # not every encoding has the bars
    if "ray" in names and JOINS_CLUSTER:
        print("ray joins the cluster of RAY_ADDRESS; others run here", file=sys.stderr)
    for num_cpus in args.num_cpus:
        print(f"{TITLE} {num_cpus} workers, {args.num_trials} trials", file=table)
        print(f"after {args.num_warmups} warm-ups, {facts}\n\n{HEADER}", file=table)
        for name in names:
            setup, *passes = run(name, num_cpus, args.num_warmups + args.num_trials)
            seconds = [each["seconds"] for each in passes[args.num_warmups :]]
            mean = statistics.mean(seconds)
            std = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
            if name == names[0]:
                first_mean = mean
                first_digest = passes[0]["sha256"]
            if {each["sha256"] for each in passes} != {first_digest}:
                sys.exit(f"{name} gave another result than {names[0]}")
            speedup = first_mean / mean
            row = f"{name:21}{setup['setup_seconds']:8.2f}{mean:9.3f} ± {std:<6.3f}"
            row += f"{min(seconds):8.3f} … {max(seconds):<7.3f}{speedup:6.2f}x "
            row += "█" * min(round(3 / speedup), 6)
            if std > 0.1 * mean:
                row += "\n    ± is above 10% of the mean: raise --num-trials"
            print(row, file=table, flush=True)
            if args.json:
                record = {"benchmark": os.path.basename(__file__).removesuffix(".py")}
                record |= {"implementation": name, "num_cpus": num_cpus, **setup}
                record |= {"trial_seconds": seconds, "mean_seconds": mean}
                record |= {"std_seconds": std, "result_sha256": first_digest}
                record |= {"speedup": speedup if names[0] == "serial" else None}
                record |= {"parameters": parameters, "environment": environment}
                print(json.dumps(record), flush=True)
        print("All results agree.\n", file=table)


def main():
    physical = psutil.cpu_count(logical=False)  # None where it cannot be found out
    cores = os.cpu_count() if physical is None else physical
    if hasattr(os, "sched_getaffinity"):  # the CPUs this process may use; not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=TITLE, formatter_class=formatter)
    add = parser.add_argument
    names = list(IMPLEMENTATIONS)
    add("--implementations", nargs="+", choices=names, default=names, help="to compare")
    add("--num-cpus", nargs="+", type=int, default=[cores], help="workers")
    add("--num-trials", type=int, default=5, help="timed passes")
    add("--num-warmups", type=int, default=NUM_WARMUPS, help="passes before them")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--json", action="store_true", help="print JSON lines; tables go to stderr")
    add("--script-pid", type=int, help=argparse.SUPPRESS)
    for size, (default, meaning) in SIZES.items():
        add("--" + size.replace("_", "-"), type=int, default=default, help=meaning)
    args = parser.parse_args()
    sizes = {size: getattr(args, size) for size in SIZES}
    if min(args.num_trials, *args.num_cpus, *sizes.values()) < 1:
        parser.error("workers, trials and sizes must be at least 1")
    if min(args.num_warmups, args.seed) < 0:
        parser.error("--num-warmups and --seed must not be negative")
    parameters = {"seed": args.seed, **sizes}
    if args.script_pid:
        measure(args, parameters)
    else:
        # Ctrl-C or a closed pipe ends this process at once, and watch ends the rest.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        compare(args, parameters)


if __name__ == "__main__":
    main()
