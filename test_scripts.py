"""Tests of the real scripts at reduced size. README.md has the command."""

import contextlib
import json
import os
import pathlib
import re
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
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import expensive_init
import numerical
import save_model
import stateful

HERE = pathlib.Path(__file__).resolve().parent
FLAGS = {numerical: "--image=90", stateful: "--words=40", expensive_init: "--num-b=2"}
NAMES = list(numerical.IMPLEMENTATIONS)
each_script = pytest.mark.parametrize("script", FLAGS, ids=lambda each: each.__name__)
signal.signal(signal.SIGINT, signal.default_int_handler)  # or `&` has it ignored


@pytest.fixture(autouse=True, scope="session")
def address(tmp_path_factory):
    """Run all tests beside a model; return the address of a Ray cluster with 3 CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("model"))
        patch.setenv("PYTHONPATH", str(HERE))
        patch.setenv("RAY_ADDRESS", "")
        flags = ["save_model", "--synthetic", "--num-images=4000"]
        subprocess.run([sys.executable, "-m", *flags], check=True)
        cluster = ray.cluster_utils.Cluster(True, head_node_args={"num_cpus": 3})
        yield cluster.address
        cluster.shutdown()


@each_script
def test_command_line(script, address, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address)
    flags = f"{FLAGS[script]} --num-cpus=2 --num-warmups=1 --num-trials=1 --seed=5"
    command = [sys.executable, "-m", script.__name__, *flags.split()]
    command.append(f"--json={tmp_path}/rows")
    output = subprocess.check_output(command, stderr=subprocess.STDOUT, text=True)
    _, joins, _, _, *table, agree = output.splitlines()
    assert joins == f"Ray joins {address}, which needs 2 free CPUs"
    assert agree == "All implementations agree."
    rows = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    for name, line, row in zip(NAMES, table, rows, strict=True):
        assert line.split()[0] == row["implementation"] == name
        assert row["script"] == f"{script.__name__}.py"
        assert row["seed"] == 5
        assert len(row["seconds"]) == 2


def test_measurement(monkeypatch, capsys):
    clock = mock.Mock(now=0, perf_counter=lambda: clock.now)

    def implementation(passes, num_cpus):
        clock.now += 16  # starts its workers
        for _, passed in zip(passes, [8, 4, 2, 6, 3]):
            clock.now += passed
        clock.now += 32  # ends its workers
        return "last"

    monkeypatch.setattr(sys, "argv", ["", "--num-warmups=2", "--num-trials=3"])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # main sets it; this takes it back
    with mock.patch.multiple(numerical, time=clock, freeze=str.upper):
        result = numerical.measure(implementation, numerical.parse_arguments(), [])
    assert result == ([24, 4, 2, 6, 3], "LAST")
    results = [result, ([25, 1, 1, 0.5, 8], "LAST"), ([1, 1, 1, 1, 1], "OTHER")]
    monkeypatch.setattr(numerical, "measure", mock.Mock(side_effect=results))
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
    (folder / str(os.getpid())).touch()
    # Until all workers have come, or none has for 30 seconds.
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
        flags = f"{FLAGS[script]} --num-cpus=3 --seed={seed}"
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
    for name in NAMES:
        pickles = []
        inputs = make_inputs(seed=0)
        result = script.freeze(script.IMPLEMENTATIONS[name](passes(), 3, *inputs))
        assert result == script.freeze(script.serial([1], 3, *make_inputs(seed=1)))
        assert result != script.freeze(script.serial([1], 3, *make_inputs(seed=0)))
        first, second = [os.listdir(tmp_path / f"{name}{seed}") for seed in [0, 1]]
        assert sorted(first) == sorted(second)
        assert len(first) == (0 if name == "serial" else 3)  # workers
        counts.append(len(pickles))
    # The image: 2 passes, 3 workers. The folder: 2 passes of 6 batches, or 3 workers.
    expected = {numerical: [0, 6, 0, 6, 2], expensive_init: [0, 12, 3, 12, 3]}
    assert counts == expected.get(script, [0] * 5)


def test_answers():
    image, image_filter = np.random.default_rng(1).random((2, 33, 33))
    expected = scipy.signal.fftconvolve(image, image_filter)[::5, ::5]
    np.testing.assert_allclose(numerical.filter_image(image, image_filter), expected)
    letters = np.random.default_rng(1).choice([b"a", b"b"], (100, 5))
    words = [word.tobytes() for word in letters]
    prefixes = [word[:end] for word in words for end in [1, 2, 3, 4]]
    expected = {prefix for prefix in prefixes if prefixes.count(prefix) > 3}
    assert stateful.serial([1], 1, [[words[:60]], [words[60:]]]) == expected
    no_network = mock.Mock(load_data=mock.Mock(side_effect=Exception))
    kind, _, (_, labels) = save_model.load_images(no_network, synthetic=False)
    (result,) = expensive_init.serial([1], 3, os.getcwd(), [(100, 900)])
    assert kind == "synthetic"
    assert (result == labels[100:900]).mean() > 0.9


ENDS = {  # what a script says after Ctrl-C, or after one of its workers is killed
    "stateful --num-t=999 --impl multiprocessing_tuned": "KeyboardInterrupt",
    "numerical --num-t=999 --impl multiprocessing_naive": "-SIGKILL",
    "expensive_init --impl multiprocessing_tuned": "-SIGKILL",
    "stateful --num-t=999 --impl ray_tuned": "ActorDiedError",
    "numerical --num-w=1 --num-t=2 --impl ray_naive": "All implementations agree.",
}


@pytest.mark.parametrize("command", ENDS)
def test_ends(command):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = [sys.executable, "-m", *command.split(), "--num-cpus=3"]
    process = subprocess.Popen(words, start_new_session=True, **options)
    worker = None
    try:
        while worker is None:
            assert process.poll() is None
            family = psutil.Process(process.pid).children(recursive=True)
            for child in family:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    is_worker = re.search(r"--multi|ray::[^I]", str(child.cmdline()))
                    if is_worker and child.cpu_times().user > 1:  # second
                        worker = child
        if ENDS[command] == "KeyboardInterrupt":
            os.killpg(process.pid, signal.SIGINT)
        else:
            worker.kill()
        output, _ = process.communicate()
    finally:
        process.kill()  # its family ends with it
    assert ENDS[command] in output
    assert output.count("KeyboardInterrupt") <= 1  # and not in the workers
    assert process.returncode == (0 if "agree" in output else 1)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert {each.status() for each in alive} <= {psutil.STATUS_ZOMBIE}


def test_files(tmp_path):
    texts = [(HERE / f"{script.__name__}.py").read_text() for script in FLAGS]
    assert len({text.split("\n# ---- From here")[1] for text in texts}) == 1
    validate_config(prepare_config(yaml.safe_load((HERE / "config.yaml").read_text())))
    for snippet in (HERE / "README.md").read_text().split("```python\n")[1:]:
        (tmp_path / "snippet.py").write_text(snippet.split("```")[0])
        subprocess.run([sys.executable, tmp_path / "snippet.py"], check=True)
