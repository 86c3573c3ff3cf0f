"""Tests of the real scripts at reduced size. README.md has the command."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import psutil
import pytest
import ray.cluster_utils
import scipy.signal

import expensive_init
import numerical
import save_model
import stateful

HERE = pathlib.Path(__file__).resolve().parent
SIZES = {numerical: "--image-s=90", stateful: "--words=40", expensive_init: "--num-b=5"}
NAMES = list(numerical.IMPLEMENTATIONS)
each_script = pytest.mark.parametrize("script", SIZES, ids=lambda each: each.__name__)
signal.signal(signal.SIGINT, signal.default_int_handler)  # or `&` has it ignored


@pytest.fixture(autouse=True, scope="session")
def address(tmp_path_factory):
    """Run all tests beside a model; return the address of a Ray cluster with 3 CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("model"))
        patch.setenv("PYTHONPATH", str(HERE))
        subprocess.run([sys.executable, "-m", "save_model", "--synthetic"], check=True)
        cluster = ray.cluster_utils.Cluster(True, head_node_args={"num_cpus": 3})
        yield cluster.address
        cluster.shutdown()


@each_script
def test_command_line(script, address, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address if script is stateful else "")
    file = tmp_path / "results.jsonl"
    file.write_text("{}\n")  # rows are added to it
    flags = [SIZES[script], "--num-cpus=1", "--num-warmups=1", "--num-trials=1"]
    command = [sys.executable, "-m", script.__name__, *flags, "--json", file]
    output = subprocess.check_output(command, stderr=subprocess.STDOUT, text=True)
    head = {stateful: [f"Ray joins {address}, which needs 1 free CPUs"]}.get(script, [])
    _, *lines, agree = output.splitlines()
    assert [*lines[:-6], agree] == [*head, "", "All implementations agree."]
    _, *rows = map(json.loads, file.read_text().splitlines())
    for name, line, row in zip(NAMES, lines[-5:], rows, strict=True):
        assert line.split()[0] == row["implementation"] == name
        assert (row["script"], len(row["seconds"])) == (f"{script.__name__}.py", 2)


def test_measurement(monkeypatch, capsys):
    clock = mock.Mock(now=0, perf_counter=lambda: clock.now)
    runs = [([8, 4, 2, 6, 3], [7.0]), ([9, 1, 1, 0.5, 8], [7.0]), ([1] * 5, [7.1])]

    def fake(passes, num_cpus, *inputs):
        seconds, result = runs.pop(0)
        clock.now += 16  # starts its workers
        for _, passed in zip(passes, seconds):
            clock.now += passed
        clock.now += 32  # ends its workers
        return result

    monkeypatch.setattr(numerical, "IMPLEMENTATIONS", dict.fromkeys(NAMES, fake))
    monkeypatch.setattr(numerical, "time", clock)
    monkeypatch.setattr(sys, "argv", ["", "--num-warmups=2", "--num-trials=3"])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # main sets it; this takes it back
    with pytest.raises(SystemExit, match="multiprocessing_tuned and serial differ"):
        numerical.main()
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    assert ["24.000", "3.000", "2.000", "6.000", "1.00x"] in lines
    assert ["25.000", "1.000", "0.500", "8.000", "3.00x"] in lines
    for flag in ["--num-cpus=0", "--num-trials=0", "--num-warmups=-1"]:
        monkeypatch.setattr(sys, "argv", ["", flag])
        with pytest.raises(SystemExit, match="2"):
            numerical.parse_arguments()


def arrive(folder, value):
    (folder / str(os.getpid())).touch()  # and wait for all workers, or 30 seconds
    while len(os.listdir(folder)) < 3 and time.time() < folder.stat().st_mtime + 30:
        time.sleep(0.01)
    return value


def spy_on(value, folder, pickles):
    """Return the value, or a list of values, that is noted where it is pickled."""
    if isinstance(value, (list, tuple)):
        return [spy_on(each, folder, pickles) for each in value]

    def reduce(self, protocol):
        pickles.append(value)
        return arrive, (folder, value)

    spy = type("Spy", (type(value),), {"__reduce_ex__": reduce})
    return value.view(spy) if isinstance(value, np.ndarray) else spy(value)


@each_script
def test_implementations(script, address, monkeypatch, tmp_path):
    """Each pass sends its inputs, as often as said, to all workers, and starts anew."""
    monkeypatch.setattr(script, "RAY_ADDRESS", address)

    def make_inputs(seed):
        flags = f"{SIZES[script]} --num-cpus=3 --seed={seed}"
        monkeypatch.setattr(sys, "argv", ["", *flags.split()])
        *first, pieces = script.make_inputs(script.parse_arguments())
        folder = tmp_path / f"{name}{seed}"
        folder.mkdir(exist_ok=True)
        return [*spy_on(first, folder, pickles), spy_on(list(pieces), folder, [])]

    def passes():
        yield
        for old, new in zip(inputs, make_inputs(seed=1)):
            if not isinstance(old, str):
                old[:] = new
        yield

    counts = []
    results = set()
    for name in NAMES:
        pickles = []
        inputs = make_inputs(seed=0)
        results.add(script.freeze(script.IMPLEMENTATIONS[name](passes(), 3, *inputs)))
        counts.append(len(pickles))
        first, second = [os.listdir(tmp_path / f"{name}{seed}") for seed in [0, 1]]
        assert sorted(first) == sorted(second)
        assert len(first) == (0 if name == "serial" else 3)  # workers
    assert results == {script.freeze(script.serial([1], 3, *make_inputs(seed=1)))}
    assert results != {script.freeze(script.serial([1], 3, *make_inputs(seed=0)))}
    # The image: 2 passes, 3 workers. The folder: 2 passes of 15 batches, or 3 workers.
    expected = {numerical: [0, 6, 0, 6, 2], expensive_init: [0, 30, 3, 30, 3]}
    assert counts == expected.get(script, [0] * 5)


def test_answers(address, monkeypatch):
    image, image_filter = np.random.default_rng(1).random((2, 33, 33))
    expected = scipy.signal.fftconvolve(image, image_filter)[::5, ::5]
    np.testing.assert_allclose(numerical.filter_image(image, image_filter), expected)
    batches = [[[b"abcd", b"abcd", b"xyz"]], [[b"abcd", b"abcd", b"xyz", b"xyz"]]]
    assert stateful.serial([1], 1, batches) == {b"a", b"ab", b"abc"}
    _, (_, labels) = save_model.make_synthetic_images()
    (result,) = expensive_init.serial([1], 3, os.getcwd(), [(100, 900)])
    assert (result == labels[100:900]).mean() > 0.9
    monkeypatch.setattr(stateful, "RAY_ADDRESS", address)
    for tuned in [stateful.multiprocessing_tuned, stateful.ray_tuned]:
        with pytest.raises(TypeError):  # in the worker: a list cannot be counted
            tuned([1], 1, [[[[0, 1]]]])


@pytest.mark.parametrize("end", ["KeyboardInterrupt", "-SIGKILL"])
def test_ends(end):
    command = "-m stateful --implementations multiprocessing_tuned --num-trials 999"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = [sys.executable, *command.split(), "--num-cpus=3"]
    process = subprocess.Popen(words, start_new_session=True, **options)
    try:
        family = []  # the resource tracker of multiprocessing, and three workers
        while len(family) < 4 or family[-1].cpu_times().user < 1:
            assert process.poll() is None
            family = psutil.Process(process.pid).children()
        family[-1].send_signal(signal.SIGINT)  # which workers ignore
        while family[-1].cpu_times().user < 2:
            assert process.poll() is None
        if end == "-SIGKILL":
            family[-1].kill()
        else:
            os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()  # its workers end with it
    assert end in output
    assert process.returncode in [1, -signal.SIGINT]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert {each.status() for each in alive} <= {psutil.STATUS_ZOMBIE}


def test_files(tmp_path):
    texts = [(HERE / f"{script.__name__}.py").read_text() for script in SIZES]
    assert len({text.split("\n# ---- From here")[1] for text in texts}) == 1
    for snippet in (HERE / "README.md").read_text().split("```python\n")[1:]:
        (tmp_path / "snippet.py").write_text(snippet.split("```")[0])
        subprocess.run([sys.executable, tmp_path / "snippet.py"], check=True)
