"""Tests of the real scripts at reduced size. README.md has the command."""

import contextlib
import functools
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
FLAGS = {
    numerical: "--image-size=90 --filter-size=3",
    stateful: "--num-documents=9 --words-per-document=40 --word-length=3",
    expensive_init: "--num-batches=2 --batch-size=100",
}
NAMES = list(numerical.IMPLEMENTATIONS)
each_script = pytest.mark.parametrize("script", FLAGS, ids=lambda each: each.__name__)
pytestmark = pytest.mark.timeout(300, func_only=True)  # seconds, without the fixtures
signal.signal(signal.SIGINT, signal.default_int_handler)  # or `&` has it ignored


@pytest.fixture(autouse=True, scope="session")
def address(tmp_path_factory):
    """Run all tests beside a model; return the address of a Ray cluster with 3 CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("model"))
        patch.setenv("PYTHONPATH", str(HERE))
        patch.setenv("RAY_ADDRESS", "")
        flags = ["--synthetic", "--num-images=4000"]
        subprocess.run([sys.executable, "-m", "save_model", *flags], check=True)
        cluster = ray.cluster_utils.Cluster(True, head_node_args={"num_cpus": 3})
        yield cluster.address
        cluster.shutdown()


def parse(script, flags):
    with mock.patch("sys.argv", ["", *flags.split()]):
        return script.parse_arguments()


@each_script
def test_command_line(script, address, monkeypatch, tmp_path):
    flags = f"{FLAGS[script]} --num-cpus=2 --num-warmups=1 --num-trials=2 --seed=5"
    flags += f" --json={tmp_path}/rows"
    monkeypatch.setenv("RAY_ADDRESS", address)
    command = [sys.executable, "-m", script.__name__, *flags.split()]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.stderr == ""
    assert f"Ray joins {address}, which needs 2 free CPUs" in process.stdout
    assert process.stdout.endswith("All implementations agree.\n")
    rows = [json.loads(row) for row in (tmp_path / "rows").read_text().splitlines()]
    assert [row["implementation"] for row in rows] == NAMES
    for row in rows:
        assert row.items() >= vars(parse(script, flags)).items()
        assert row["script"] == f"{script.__name__}.py"
        assert len(row["seconds"]) == 3


def test_measurement(monkeypatch, tmp_path, capsys):
    clock = mock.Mock(now=0, perf_counter=lambda: clock.now)

    def implementation(result, seconds, passes, num_cpus):
        clock.now += 16  # starts its workers
        for _, passed in zip(passes, seconds):
            clock.now += passed
        clock.now += 32  # ends its workers
        return result

    def freeze(result):
        clock.now += 64
        return result

    a = functools.partial(implementation, 1, [8, 4, 2, 6, 3])
    b = functools.partial(implementation, 1, [9, 1, 1, 0.5, 8])
    c = functools.partial(implementation, 2, [9, 1, 1, 0.5, 8])
    monkeypatch.setattr(numerical, "IMPLEMENTATIONS", {"a": a, "b": b, "c": c})
    monkeypatch.setattr(numerical, "make_inputs", lambda args: [])
    monkeypatch.setattr(numerical, "freeze", freeze)
    monkeypatch.setattr(numerical, "time", clock)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # which main sets; this takes it back
    argv = ["", "--num-warmups=2", "--num-trials=3", f"--json={tmp_path}/rows"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="c and a differ"):
        numerical.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "24.000", "3.000", "2.000", "6.000", "1.00x"] in lines
    assert ["b", "25.000", "1.000", "0.500", "8.000", "3.00x"] in lines
    rows = [json.loads(row) for row in (tmp_path / "rows").read_text().splitlines()]
    assert [row["seconds"] for row in rows] == [[24, 4, 2, 6, 3], [25, 1, 1, 0.5, 8]]
    for flag in ["--num-cpus=0", "--num-trials=0", "--num-warmups=-1"]:
        with pytest.raises(SystemExit, match="2"):
            parse(numerical, flag)


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
        args = parse(script, f"{FLAGS[script]} --num-cpus=3 --seed={seed}")
        *first, pieces = script.make_inputs(args)
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
        workers = [set(os.listdir(tmp_path / f"{name}{seed}")) for seed in [0, 1]]
        assert workers[0] == workers[1]
        assert len(workers[0]) == (0 if name == "serial" else 3)
        counts.append(len(pickles))
    if script == numerical:  # the image is sent in 2 passes to 3 workers
        assert counts == [0, 6, 0, 6, 2]
    if script == expensive_init:  # the folder is sent for 2 x 6 batches or to 3 workers
        assert counts == [0, 12, 3, 12, 3]


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


ENDS = [
    ("numerical --impl multiprocessing_naive", signal.SIGKILL, 1, "-SIGKILL"),
    ("expensive_init --impl multiprocessing_tuned", signal.SIGKILL, 1, "-SIGKILL"),
    ("stateful --impl multiprocessing_tuned", signal.SIGINT, 1, "KeyboardInterrupt"),
    ("stateful --impl ray_tuned", signal.SIGKILL, 1, "ActorDiedError"),
    ("numerical --num-t=3 --impl ray_naive", signal.SIGKILL, 0, ""),
]


@pytest.mark.parametrize(("command", "number", "status", "words"), ENDS)
def test_ends(command, number, status, words):
    """SIGKILL ends a worker, also one that is still starting; SIGINT goes to all."""
    command = [sys.executable, "-m", *command.split(), "--num-cpus=3"]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **options)
    worker = None
    try:
        while worker is None:
            family = psutil.Process(process.pid).children(recursive=True)
            for child in family:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    is_worker = re.search(r"--multi|ray::[^I]", str(child.cmdline()))
                    if is_worker and child.cpu_times().user > 1:  # second
                        worker = child
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            worker.send_signal(number)
        _, error = process.communicate()
    finally:
        process.kill()  # its family ends with it
    assert process.returncode == status
    assert words in error
    _, alive = psutil.wait_procs(family, timeout=20)
    assert {each.status() for each in alive} <= {psutil.STATUS_ZOMBIE}


def test_files(tmp_path):
    texts = [(HERE / f"{script.__name__}.py").read_text() for script in FLAGS]
    assert len({text.split("\n# ---- From here")[1] for text in texts}) == 1
    validate_config(prepare_config(yaml.safe_load((HERE / "config.yaml").read_text())))
    for snippet in (HERE / "README.md").read_text().split("```python\n")[1:]:
        (tmp_path / "snippet.py").write_text(snippet.split("```")[0])
        subprocess.run([sys.executable, tmp_path / "snippet.py"], check=True)
