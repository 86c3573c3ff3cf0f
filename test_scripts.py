"""Tests of the real scripts at reduced size. README.md has the command."""

import collections
import contextlib
import importlib
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
import psutil
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ["serial", "multiprocessing", "multiprocessing-tuned", "ray"]
SIZES = {
    "numerical": {"image_size": 33, "filter_size": 4},
    "stateful": {"num_documents": 4, "words_per_document": 1000, "word_length": 6},
    "expensive_init": {"num_batches": 3, "batch_size": 400},
}
FIELDS = """benchmark implementation num_cpus setup_seconds trial_seconds mean_seconds
std_seconds speedup result_sha256 parameters environment"""
# What a user may have set, and what must not matter.
os.environ.update(KERAS_BACKEND="jax", TF_USE_LEGACY_KERAS="1", RAY_ADDRESS="local")
os.environ.update(PYTHONIOENCODING="latin-1", PYTHONPATH=str(HERE))


def start(arguments, cwd=HERE, **options):
    """Start Python in a session of its own, as a terminal would."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options |= {"cwd": cwd, "encoding": "latin-1", "start_new_session": True}
    return subprocess.Popen([sys.executable, *arguments.split()], **options)


def finish(process, status=0):
    """Wait for a process and check its exit status; return its stdout and stderr."""
    output, error = process.communicate(timeout=120)
    assert process.returncode == status, output + error
    return output, error


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return a folder in which save_model.py ran, as on a closed network."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "keras.json").write_text('{"backend": "torch", "floatx": "float64"}')
    os.environ |= {"KERAS_HOME": str(folder), "https_proxy": "http://127.0.0.1:9"}
    output, error = finish(start("-m save_model --num-images 4000", folder))
    assert "MNIST cannot be had, using synthetic images: " in error
    assert "synthetic images" in output.splitlines()[-1]
    return folder


def test_save_model_is_deterministic_and_keeps_a_good_model(model):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes a file

    first = zipfile.ZipFile(model / "model.keras").read("model.weights.h5")
    finish(start("-m save_model --num-images 32", model, preexec_fn=small_disk), 1)
    assert zipfile.ZipFile(model / "model.keras").read("model.weights.h5") == first
    finish(start("-m save_model --num-images 4000", model))
    assert zipfile.ZipFile(model / "model.keras").read("model.weights.h5") == first


def call(name, num_cpus, implementations=NAMES):
    """Return the inputs, and the results of two calls of each implementation."""
    module = importlib.import_module(name)
    inputs = module.make_inputs(num_cpus, 1, **SIZES[name])
    trials = [module.IMPLEMENTATIONS[each](*inputs) for each in implementations]
    results = [trial() for trial in trials + trials]
    ray.shutdown()
    return inputs, results


@pytest.mark.parametrize(("num_cpus", "names"), [(3, NAMES), (1, NAMES[:3])])
def test_numerical_answers(num_cpus, names):
    (image, filters), results = call("numerical", num_cpus, names)
    spectra = np.fft.rfft2(image, (36, 36)) * np.fft.rfft2(filters, (36, 36))
    expected = np.fft.irfft2(spectra)[:, ::5, ::5]  # a convolution is a product
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-9)


@pytest.mark.parametrize(("num_cpus", "names"), [(3, NAMES), (1, NAMES[:3])])
def test_stateful_answers(num_cpus, names):
    (batches, _), results = call("stateful", num_cpus, names)
    words = [word for batch in batches for document in batch for word in document]
    counts = collections.Counter(word[:i] for word in words for i in range(1, 6))
    expected = {prefix for prefix, count in counts.items() if count > 3}
    assert 0 < len(expected) < len(counts)
    assert all(result == expected for result in results)


def test_expensive_init_answers(model, monkeypatch):
    monkeypatch.chdir(model)
    (_, _, batches), results = call("expensive_init", 2)
    _, (_, labels) = importlib.import_module("save_model").make_synthetic_images()
    expected = [labels[start:stop] for start, stop in batches]
    assert len({start for start, _ in batches}) == len(batches) == 6
    assert (np.array(results[0]) == expected).mean() > 0.9
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_mistakes(tmp_path):
    for flags in ["--num-cpus 0", "--num-warmups -1", "--bogus"]:
        _, error = finish(start(f"numerical.py {flags}"), 2)
        assert "numerical.py: error: " in error
    _, error = finish(start(f"{HERE}/expensive_init.py", tmp_path), 1)
    assert re.fullmatch(r"serial: .*run save_model\.py first\n", error)


DOUBLE = """
import numerical
def set_up_double(image, filters):
    trial = numerical.set_up_serial(image, filters)
    return lambda: RESULT
numerical.IMPLEMENTATIONS["multiprocessing"] = set_up_double
numerical.__file__ = __file__  # what its children run
numerical.main()
"""


@pytest.mark.parametrize("result", ["[2 * part for part in trial()]", "1 / 0"])
def test_wrong_result_and_error(result, tmp_path):
    (tmp_path / "double.py").write_text(DOUBLE.replace("RESULT", result))
    flags = "--implementations serial multiprocessing --image-size 33"
    _, error = finish(start(f"double.py {flags}", tmp_path), 1)
    assert error.splitlines()[-1].startswith("multiprocessing ")
    assert ("ZeroDivisionError" in error) == (result == "1 / 0")


def start_busy(arguments, cwd=HERE):
    """Start a script; return its process and its two workers once they have worked."""
    process = start(f"{HERE}/{arguments} --num-cpus 2", cwd)
    workers = []
    while len(workers) < 2:
        assert process.poll() is None
        time.sleep(0.05)
        workers = []
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may have ended
                fits = re.search(r"spawn_main|ray::\w+[_.]", " ".join(child.cmdline()))
                if fits and child.cpu_times().user > 0.5:
                    workers.append(child)
    return process, workers


def test_killed_actor(model):
    process, workers = start_busy(
        "expensive_init.py --impl ray --num-batches 60", model
    )
    workers[0].kill()
    output, _ = finish(process)
    assert output.endswith("All results agree.\n\n")


KILLED = [
    ("multiprocessing", "worker", signal.SIGKILL, 1, ".*multiprocessing failed: .*"),
    ("multiprocessing", "script", signal.SIGKILL, -signal.SIGKILL, ""),
    ("ray", "script", signal.SIGINT, -signal.SIGINT, ""),
]


@pytest.mark.parametrize(("name", "victim", "number", "status", "pattern"), KILLED)
def test_everything_ends(name, victim, number, status, pattern):
    process, workers = start_busy(f"numerical.py --impl {name} --filter-size 40")
    family = psutil.Process(process.pid).children(recursive=True)
    semaphores = []
    if psutil.LINUX and name == "multiprocessing":
        maps = [pathlib.Path(f"/proc/{child.pid}/maps").read_text() for child in family]
        inodes = re.findall(r"(\d+) +/dev/shm/sem\.", "".join(maps))
        for entry in os.scandir("/dev/shm"):
            if str(entry.inode()) in inodes:
                semaphores.append(entry.path)
        assert semaphores
    {"worker": workers[0], "script": process}[victim].send_signal(number)
    _, error = finish(process, status)
    assert re.fullmatch(pattern, error, re.DOTALL)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert all(each.status() == psutil.STATUS_ZOMBIE for each in alive)
    assert not any(os.path.exists(path) for path in semaphores)


@pytest.fixture
def cluster(monkeypatch):
    """Start two nodes, of 2 CPUs and of 1, behind a token; set RAY_ADDRESS."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    folder = tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)
    command = "-m ray.scripts.scripts start --block"
    head = f"--head --port 0 --num-cpus 2 --temp-dir {folder.name}"
    nodes = [start(f"{command} {head}")]
    try:
        for line in nodes[0].stdout:
            found = re.search(r"ray start --address='(.+)'", line)
            if found:
                break
        monkeypatch.setenv("RAY_ADDRESS", found[1])
        nodes.append(start(f"{command} --address {found[1]} --num-cpus 1"))
        assert any("Ray runtime started" in line for line in nodes[1].stdout)
        yield nodes
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.communicate()


def test_json_on_a_cluster(cluster):
    for name in ["numerical", "stateful"]:
        flags = " ".join(f"--{size} {value}" for size, value in SIZES[name].items())
        flags = flags.replace("_", "-") + " --num-cpus 3 --json"  # both nodes' CPUs
        output, error = finish(start(f"{name}.py {flags}"))
        records = [json.loads(line) for line in output.splitlines()]
        assert [record["implementation"] for record in records] == NAMES
        for record in records:
            assert set(record) == set(FIELDS.split())
            assert record["parameters"] == {"seed": 0, **SIZES[name]}
            assert len(record["trial_seconds"]) == 5
            assert record["result_sha256"] == records[0]["result_sha256"]
        assert error.startswith("ray joins the cluster of RAY_ADDRESS")
        assert re.search(r"^serial .* ± .* 1\.00x \?\?\?$", error, re.MULTILINE)
        assert error.endswith("All results agree.\n\n")
    _, error = finish(start("numerical.py --impl ray --num-cpus 4 --json"), 1)
    assert re.search(r"speedup\nray: .*lower --num-cpus\n$", error)
    assert [node.poll() for node in cluster] == [None, None]


def test_identical_parts_and_requirements():
    parts = set()
    needed = set()
    for name in [*SIZES, "save_model"]:
        text = (HERE / f"{name}.py").read_text()
        block = re.search(r"^# dependencies = (.*)$", text, re.MULTILINE)
        needed |= set(json.loads(block[1]))
        parts.add(text.partition("\n# ---- From here")[2])
    lines = (HERE / "requirements.txt").read_text().splitlines()
    assert needed == {line for line in lines if not line.startswith("#")}
    assert len(parts - {""}) == 1


def test_readme_and_config():
    readme = (HERE / "README.md").read_text()
    [snippet] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    subprocess.run([sys.executable, "-c", snippet], check=True)
    [gcp] = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    for changes in [{}, yaml.safe_load(gcp)]:
        config = yaml.safe_load((HERE / "config.yaml").read_text()) | changes
        validate_config(prepare_config(config))
