"""Tests of the real scripts at reduced size. README.md has the command."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import zipfile

import numpy as np
import psutil
import pytest

import expensive_init
import numerical
import save_model
import stateful

HERE = pathlib.Path(__file__).resolve().parent
FLAGS = {
    "numerical": "--image-size 90 --num-cpus 2",
    "stateful": "--words-per-document 900 --word-length 5 --num-cpus 1 2",
    "expensive_init": "--num-batches 1 --batch-size 400 --num-cpus 2",
}
FIELDS = "benchmark first_seconds num_trials num_warmups seed python platform ray"
pytestmark = pytest.mark.timeout(60)  # seconds
ENVIRONMENT = os.environ | {"KERAS_BACKEND": "jax", "TF_USE_LEGACY_KERAS": "1"}
ENVIRONMENT |= {"PYTHONIOENCODING": "ascii", "RAY_ADDRESS": ""}
signal.signal(signal.SIGINT, signal.default_int_handler)  # or `&` has it ignored


def start(command, folder=HERE, stdout=subprocess.PIPE, **environment):
    """Start Python in a process group of its own, as a terminal does."""
    options = {"cwd": folder, "env": ENVIRONMENT | environment, "text": True}
    options |= {"stdout": stdout, "stderr": subprocess.PIPE, "start_new_session": True}
    return subprocess.Popen([sys.executable, *command.split()], **options)


def finish(process, status=0):
    output, error = process.communicate()
    assert process.returncode == status, output + error
    return output, error


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return a folder in which save_model.py ran twice, as on a closed network."""
    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    closed = {"KERAS_HOME": str(folders[0]), "https_proxy": "http://127.0.0.1:9"}
    command = f"{HERE}/save_model.py --num-images 4000"
    for run in [start(command, folder, **closed) for folder in folders]:
        finish(run)
    models = [zipfile.ZipFile(folder / "model.keras") for folder in folders]
    assert len({each.read("model.weights.h5") for each in models}) == 1
    return folders[0]


@pytest.mark.parametrize("name", FLAGS)
def test_command_line(name, model, tmp_path):
    flags = f"{FLAGS[name]} --num-trials 2 --num-warmups 1 --json {tmp_path}/rows"
    output, error = finish(start(f"{HERE}/{name}.py {flags}", model))
    assert not re.search("tensorflow|cuda|token", error, re.IGNORECASE)
    sizes = [flag.replace("-", "_") for flag in re.findall("--([a-z-]+)", FLAGS[name])]
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    for num_cpus in [1, 2] if name == "stateful" else [2]:
        table = [row for row in rows if row["num_cpus"] == num_cpus]
        assert [row["implementation"] for row in table] == [*stateful.IMPLEMENTATIONS]
        for row in table:
            assert {*FIELDS.split(), *sizes} <= set(row)
            assert row["result_sha256"] == table[0]["result_sha256"]
            one, two = row["trial_seconds"]
            assert row["mean_seconds"] == pytest.approx((one + two) / 2)
            assert row["std_seconds"] == pytest.approx(abs(one - two) / 2**0.5)
            assert row["speedup"] == table[0]["mean_seconds"] / row["mean_seconds"]
            line = "^{implementation} .* {mean_seconds:.3f} .* {speedup:.2f}x$"
            assert re.search(line.format(**row), output, re.MULTILINE)
    assert output.endswith("All results agree.\n")


def test_numerical_answer():
    image, image_filter = np.random.default_rng(1).random((2, 33, 33))
    spectrum = np.fft.rfft2(image, (65, 65)) * np.fft.rfft2(image_filter, (65, 65))
    expected = np.fft.irfft2(spectrum, (65, 65))[::5, ::5]  # a convolution is a product
    np.testing.assert_allclose(numerical.filter_image(image, image_filter), expected)


def test_stateful_answer():
    words = [np.random.default_rng(seed).bytes(5) for seed in range(500)]
    prefixes = [word[:end] for word in words for end in range(1, 5)]
    counter = stateful.PrefixCounter()
    counter.add(words)
    expected = {prefix for prefix in prefixes if prefixes.count(prefix) > 3}
    assert counter.pop_popular() == expected


def test_expensive_init_answer(model, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    _, (_, labels) = save_model.make_synthetic_images()
    classifier = expensive_init.Classifier(str(model))
    assert (classifier.classify(100, 900) == labels[100:900]).mean() > 0.9


def test_wrong_result(monkeypatch):
    wrong = contextlib.nullcontext(lambda: [np.zeros(1)])
    monkeypatch.setitem(numerical.IMPLEMENTATIONS, "multiprocessing", lambda *_: wrong)
    monkeypatch.setattr(sys, "argv", ["numerical.py", "--image-size", "33"])
    with pytest.raises(SystemExit, match="multiprocessing differs from serial's"):
        numerical.main()


@pytest.mark.parametrize(
    ("command", "victim", "name", "status", "words"),
    [
        ("stateful.py --impl multiprocessing-tuned", "worker", "SIGKILL", 1, "code -9"),
        ("stateful.py --impl multiprocessing-tuned", "script", "SIGKILL", -9, ""),
        ("stateful.py --impl multiprocessing-tuned", "all", "SIGINT", -2, "Interrupt"),
        ("stateful.py --impl ray", "all", "SIGINT", -2, "Interrupt"),
        ("expensive_init.py --impl ray", "worker", "SIGKILL", 0, ""),
    ],
)
def test_ends(command, victim, name, status, words, model):
    controller, terminal = os.openpty()
    process = start(f"{HERE}/{command} --num-trials 9", model, stdout=terminal)
    os.close(terminal)
    while b"passes" not in os.read(controller, 1000):  # fails if the script has ended
        pass
    family = psutil.Process(process.pid).children(recursive=True)
    pids = {"script": process.pid, "all": -process.pid}
    for child in family:
        if re.search("spawn_main|ray::Classifier", str(child.cmdline())):
            pids["worker"] = child.pid
    os.kill(pids[victim], signal.Signals[name])
    _, error = finish(process, status)
    assert words in error
    assert error.count("Traceback") <= 1
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_mistakes(model, tmp_path):
    for flags in ["--num-cpus 0", "--num-warmups 0", "--json /nowhere/x"]:
        _, error = finish(start(f"stateful.py {flags}"), 2)
        assert "stateful.py: error: " in error
    _, error = finish(start(f"{HERE}/expensive_init.py", tmp_path), 1)
    assert error.endswith("run save_model.py first\n")
    _, error = finish(start(f"{HERE}/expensive_init.py --batch-size 10001", model), 1)
    assert error.endswith("images.npy has 10000 images\n")


def test_cluster():
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    command = "-m ray.scripts.scripts start --block --num-cpus"
    folder = f"/tmp/ray/test_{os.getpid()}"  # not the one in which others look
    head = start(f"{command} 2 --head --port 0 --temp-dir {folder}", **token)
    address = next(line for line in head.stdout if "--address=" in line).split("'")[1]
    node = start(f"{command} 1 --address {address}", **token)
    try:
        command = "stateful.py --words-per-document 90 --num-cpus 3 --impl serial ray"
        output, error = finish(start(command, RAY_ADDRESS=address, **token))
        assert "Waiting for 3 free CPUs" in error
        assert output.endswith("All results agree.\n")
        assert head.poll() is node.poll() is None
    finally:
        for each in [node, head]:
            each.terminate()
            each.communicate()


def test_files(tmp_path):
    texts = [(HERE / f"{name}.py").read_text() for name in FLAGS]
    assert len({text.split("\n# ---- From here")[1] for text in texts}) == 1
    for requirement in re.findall('"([a-z]+>=.*?)"', "".join(texts)):
        assert f"{requirement}\n" in (HERE / "requirements.txt").read_text()
    readme = (HERE / "README.md").read_text()
    snippet = re.search("```python\n(import multi.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "snippet.py").write_text(snippet)
    finish(start("snippet.py", tmp_path))
