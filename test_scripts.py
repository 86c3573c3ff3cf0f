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

import expensive_init
import numerical
import save_model
import stateful

HERE = pathlib.Path(__file__).resolve().parent
SIZES = {
    numerical: {"num_cpus": 3, "image_size": 90, "filter_size": 3},
    stateful: {"num_cpus": 3, "words_per_document": 40, "word_length": 3},
    expensive_init: {"num_cpus": 3, "num_batches": 2, "batch_size": 100},
}
ENVIRONMENT = {"RAY_ADDRESS": "", "PYTHONPATH": str(HERE), "KERAS_BACKEND": "jax"}
each_script = pytest.mark.parametrize("script", SIZES, ids=lambda each: each.__name__)
pytestmark = pytest.mark.timeout(200, func_only=True)  # seconds, without the fixture
signal.signal(signal.SIGINT, signal.default_int_handler)  # or `&` has it ignored


@pytest.fixture(autouse=True, scope="session")
def model(tmp_path_factory):  # made as on a closed network; all tests run beside it
    with mock.patch.dict(os.environ, ENVIRONMENT), pytest.MonkeyPatch.context() as mp:
        mp.chdir(tmp_path_factory.mktemp("model"))
        finish(start("save_model.py --num 4000", KERAS_HOME=".", https_proxy="none:9"))
        yield


def start(command, **environment):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options |= {"start_new_session": True, "env": os.environ | environment}
    command = f"exec '{sys.executable}' -OO '{HERE}'/{command}"
    return subprocess.Popen(["bash", "-c", command], **options)


def finish(process, status=0):
    output, error = process.communicate()
    assert process.returncode == status, output + error
    return output, error


def check_table(output, path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        trials = row["seconds"][row["num_warmups"] :]
        median = row["median_seconds"]
        assert median == np.median(trials)
        line = f"{row['implementation']:22}{row['seconds'][0]:9.2f}{median:9.3f}"
        line += f"{min(trials):9.3f}{max(trials):9.3f}"
        assert f"\n{line}{rows[0]['median_seconds'] / median:8.2f}x\n" in output
    assert output.endswith("All results agree.\n")
    return rows


@each_script
def test_command_line(script, tmp_path):
    fields = SIZES[script] | {"num_cpus": 2, "num_trials": 2, "seed": 5}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in fields.items()]
    call = f"{script.__name__}.py {' '.join(flags)} --json {tmp_path}/rows"
    output, error = finish(start(call))
    assert not re.search("tensorflow|cuda|token", error, re.IGNORECASE)
    rows = check_table(output, tmp_path / "rows")
    assert [row["implementation"] for row in rows] == [*script.IMPLEMENTATIONS]
    for row in rows:
        assert row.items() >= (fields | {"benchmark": script.__name__}).items()
    finish(start(f"{call} --num-t 1 --num-w 0 --impl multiprocessing ray <&- >&- 2>&-"))


def test_measurement(monkeypatch, tmp_path, capsys):
    naps = {"one": [1, 0.1, 0.3, 0.5, 0.1], "two": [0.6, 0.2, 0.2, 0.1, 0]}  # seconds
    implementations = {
        "one": lambda _: (time.sleep(nap) for nap in naps["one"]),
        "two": lambda _: ([time.sleep(nap)] for nap in naps["two"]),
    }
    monkeypatch.setattr(numerical, "IMPLEMENTATIONS", implementations)
    monkeypatch.setattr(numerical, "make_inputs", lambda args: [])
    monkeypatch.setattr(numerical, "freeze", lambda result: time.sleep(0.5))  # untimed
    flags = f"--num-warmups 2 --num-trials 3 --json {tmp_path}/rows"
    monkeypatch.setattr(sys, "argv", ["numerical.py", *flags.split()])
    numerical.main()
    for row in check_table(capsys.readouterr().out, tmp_path / "rows"):
        for slept, seconds in zip(naps[row["implementation"]], row["seconds"]):
            assert slept <= seconds < slept + 0.4
    monkeypatch.setattr(numerical, "freeze", str)  # so that the results differ
    with pytest.raises(SystemExit, match="two and one differ"):
        numerical.main()


def arrive(folder, value):
    (folder / str(os.getpid())).touch()
    # Until all workers have come, or none has for 30 seconds.
    while len(os.listdir(folder)) < 3 and time.time() < folder.stat().st_mtime + 30:
        time.sleep(0.01)
    return value


def spy_on(value, folder):  # returns it, such that it arrives where it is unpickled
    if isinstance(value, (list, tuple, np.ndarray)):
        return [spy_on(each, folder) for each in value]
    reduce = {"__reduce_ex__": lambda self, protocol: (arrive, (folder, value))}
    return type("Spy", (type(value),), reduce)(value)


@each_script
def test_workers(script, tmp_path):
    """All workers asked for share the work; each pass ships its inputs; seeds matter."""
    results = set()
    for name, implementation in script.IMPLEMENTATIONS.items():
        folder = tmp_path / name
        folder.mkdir()
        args = mock.Mock(seed=0, num_documents=9, **SIZES[script])
        *first, pieces = script.make_inputs(args)
        inputs = [*first, spy_on(pieces, folder)]
        args.seed = 1
        with contextlib.closing(implementation(3, *inputs)) as passes:
            one = script.freeze(next(passes))
            for old, new in zip(inputs, script.make_inputs(args)):
                if not isinstance(old, str):
                    old[:] = new
            two = script.freeze(next(passes))
        assert one != two
        results.add((one, two))
        assert len(os.listdir(folder)) == (0 if name == "serial" else 3)
    assert len(results) == 1


def test_answers():
    image, image_filter = np.random.default_rng(1).random((2, 33, 33))
    spectrum = np.fft.rfft2(image, (65, 65)) * np.fft.rfft2(image_filter, (65, 65))
    expected = np.fft.irfft2(spectrum, (65, 65))[::5, ::5]  # a convolution is a product
    np.testing.assert_allclose(numerical.filter_image(image, image_filter), expected)
    letters = np.random.default_rng(1).choice([b"a", b"b"], (100, 5))
    words = [word.tobytes() for word in letters]
    prefixes = [word[:end] for word in words for end in [1, 2, 3, 4]]
    expected = {prefix for prefix in prefixes if prefixes.count(prefix) > 3}
    assert next(stateful.serial(1, [[words[:60]], [words[60:]]])) == expected
    _, (_, labels) = save_model.make_synthetic_images()
    (result,) = next(expensive_init.serial(1, os.getcwd(), [(100, 900)]))
    assert (result == labels[100:900]).mean() > 0.9


ENDS = [
    ("numerical.py --num-t 99 --impl multiprocessing", 9, 1, "code -9"),
    ("stateful.py --impl multiprocessing 2>/dev/full", 15, 1, ""),
    ("stateful.py --num-t 99 --impl multiprocessing-tuned", 2, -2, "KeyboardInterrupt"),
    ("expensive_init.py --impl ray", 9, 0, ""),
]


@pytest.mark.parametrize(("command", "number", "status", "words"), ENDS)
def test_ends(command, number, status, words):
    process = start(command)
    worker = None
    while worker is None:
        time.sleep(0.1)
        assert process.poll() is None, finish(process)
        family = psutil.Process(process.pid).children(recursive=True)
        for child in family:
            with contextlib.suppress(psutil.Error):  # it has just ended
                is_worker = re.search(r"--multi|::[CP]\w+\.", str(child.cmdline()))
                if is_worker and child.cpu_times().user > 1:  # seconds
                    worker = child
    os.kill(-process.pid if number == signal.SIGINT else worker.pid, number)
    _, error = finish(process, status)
    assert words in error
    assert status >= 0 or error.count("Traceback") == 1
    _, alive = psutil.wait_procs(family, timeout=20)
    assert {each.status() for each in alive} <= {psutil.STATUS_ZOMBIE}


def test_files(tmp_path):
    texts = [(HERE / f"{script.__name__}.py").read_text() for script in SIZES]
    assert len({text.split("\n# ---- From here")[1] for text in texts}) == 1
    snippet = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "snippet.py").write_text(snippet)
    subprocess.run([sys.executable, tmp_path / "snippet.py"], check=True)
