"""Tests of the real scripts, run through their command lines at reduced size.

No figure of time is asserted: the machine may be busy. README.md has the command.
"""

import collections
import contextlib
import json
import os
import pathlib
import pickle
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import pytest

import numerical
import save_model

HERE = pathlib.Path(__file__).resolve().parent
README = HERE / "README.md"
NAMES = ["serial", "multiprocessing", "multiprocessing-tuned", "ray"]
SIZES = {
    "numerical": ["--image-size", "300"],
    "stateful": ["--num-documents", "3", "--words-per-document", "2000"],
    "expensive_init": ["--num-batches", "3", "--batch-size", "400"],
}
QUICK = ["--num-trials", "2", "--num-warmups", "0"]


def marked_processes(mark):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TEST_MARK") == mark:
                yield process


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch, request):
    """Fail a test that leaves a process, a shared-memory segment or a temporary file."""
    if request.node.get_closest_marker("skip_leftovers"):
        return
    mark = f"{os.getpid()}-{time.time_ns()}"
    monkeypatch.setenv("TEST_MARK", mark)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folders = [pathlib.Path(folder) for folder in ("/dev/shm", "/tmp")]
    before = {path for folder in folders for path in folder.glob("*")}
    yield
    deadline = time.time() + 10
    while (left := list(marked_processes(mark))) and time.time() < deadline:
        time.sleep(0.1)
    assert not left
    after = {path for folder in folders for path in folder.glob("*")}
    assert {p for p in after - before if "pytest" not in p.name} == set()


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Run save_model.py on a small .npz file; return its folder, output and arrays."""
    folder = tmp_path_factory.mktemp("made")
    x_train, y_train, x_test, y_test = save_model.make_synthetic()
    arrays = {
        "x_train": x_train[:8000],
        "y_train": y_train[:8000],
        "x_test": x_test[:1000],
        "y_test": y_test[:1000],
    }
    np.savez(folder / "small.npz", **arrays)
    command = ["--data", folder / "small.npz", "--folder", folder]
    return folder, run("save_model", *command).stdout, arrays


def run(script, *flags, status=0, cwd=HERE, **options):
    """Run a script to its end; return the finished process, its output as text."""
    command = [sys.executable, str(cwd / f"{script}.py"), *map(str, flags)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def sizes(script, made):
    paths = [
        "--model-path",
        made[0] / "model.keras",
        "--images-path",
        made[0] / "images.npy",
    ]
    return SIZES[script] + (paths if script == "expensive_init" else [])


def changed(script, tmp_path, old, new):
    """Write a copy of the script with `old` replaced by `new`; return its folder."""
    text = (HERE / f"{script}.py").read_text()
    assert old in text
    (tmp_path / f"{script}.py").write_text(text.replace(old, new))
    return tmp_path


# ---- the workloads, against independent answers ----
PROBE = """
if __name__ == "__main__":
    import copy, pickle
    args = argparse.Namespace(**json.loads(sys.argv[1]))
    inputs, answers = make_inputs(args, 3), {}
    for name, implementation in IMPLEMENTATIONS.items():
        with contextlib.contextmanager(implementation)(*inputs) as trial:
            answers[name] = [copy.deepcopy(trial()) for _ in range(2)]
    pickle.dump((inputs, answers), open(sys.argv[2], "wb"))
"""


def probe(script, tmp_path, **args):
    """Return the inputs and, for every implementation, the answers of two trials."""
    folder = changed(
        script, tmp_path, '\nif __name__ == "__main__":\n    main()\n', PROBE
    )
    run(script, json.dumps({"seed": 1, **args}), tmp_path / "out", cwd=folder)
    return pickle.loads((tmp_path / "out").read_bytes())


def test_numerical_answers(tmp_path):
    inputs, answers = probe("numerical", tmp_path, image_size=21, filter_size=4)
    image, filters = inputs
    padded = np.pad(image, 3)
    expected = []
    for kernel in filters:
        # Convolution turns the kernel around: sum of image[i - a, j - b] * kernel[a, b].
        full = [
            [
                (padded[i : i + 4, j : j + 4] * kernel[::-1, ::-1]).sum()
                for j in range(24)
            ]
            for i in range(24)
        ]
        expected.append(np.array(full)[::5, ::5])
    for name in NAMES:
        for answer in answers[name]:
            np.testing.assert_allclose(answer, expected, rtol=1e-12)


def test_stateful_answers(tmp_path):
    args = {"num_documents": 4, "words_per_document": 1000, "word_length": 6}
    (batches, _), answers = probe("stateful", tmp_path, **args)
    words = [word for batch in batches for document in batch for word in document]
    assert len(words) == 4 * 3 * 1000 and {len(word) for word in words} == {6}
    counts = collections.Counter(word[:i] for word in words for i in range(1, 6))
    expected = {prefix for prefix, count in counts.items() if count > 3}
    assert 0 < len(expected) < len(counts)
    for name in NAMES:
        assert answers[name] == [expected, expected]


def test_expensive_init_answers(tmp_path, made):
    folder, _, arrays = made
    paths = {
        "model_path": f"{folder}/model.keras",
        "images_path": f"{folder}/images.npy",
    }
    args = {"num_batches": 2, "batch_size": 300, **paths}
    (batches, *_), answers = probe("expensive_init", tmp_path, **args)
    assert len(batches) == 6
    assert all(batch.stop - batch.start == 300 for batch in batches)
    right = sum(
        (arrays["y_test"][batch] == labels).sum()
        for batch, labels in zip(batches, answers["serial"][0])
    )
    assert right > 0.9 * 6 * 300
    for name in NAMES:
        for answer in answers[name]:
            np.testing.assert_array_equal(answer, answers["serial"][0])


# ---- the command line ----
@pytest.mark.parametrize("script", SIZES)
def test_json_and_sweep(script, made):
    flags = ["--num-cpus", "1", "2", "--json", *QUICK, *sizes(script, made)]
    lines = run(script, *flags).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    expected = [(num_cpus, name) for num_cpus in (1, 2) for name in NAMES]
    assert [(r["num_cpus"], r["implementation"]) for r in records] == expected
    for record in records:
        serial = records[0 if record["num_cpus"] == 1 else len(NAMES)]
        seconds = record["trial_seconds"]
        assert len(seconds) == 2 and min(seconds) > 0 and record["setup_seconds"] >= 0
        assert record["benchmark"] == script
        assert record["mean_seconds"] == statistics.mean(seconds)
        assert record["std_seconds"] == statistics.stdev(seconds)
        speedup = serial["mean_seconds"] / record["mean_seconds"]
        assert record["speedup"] == pytest.approx(speedup)
        assert record["parameters"]["seed"] == 0 and len(record["parameters"]) > 2
        packages = set(required_packages(script)) | {
            "python",
            "platform",
            "physical_cores",
        }
        assert set(record["environment"]) == packages


def test_tables_of_a_sweep():
    flags = [
        "--implementations",
        "serial",
        "multiprocessing-tuned",
        "--num-cpus",
        "1",
        "2",
    ]
    output = run("numerical", *flags, *QUICK, *SIZES["numerical"]).stdout
    assert output.count("All results agree.") == 2
    assert len(re.findall(r"^serial .* 1\.00x  █*$", output, re.MULTILINE)) == 2
    closing = output[output.index("mean seconds") :].splitlines()
    assert closing[1].split() == ["workers", "serial", "multiprocessing-tuned"]
    assert [row.split()[0] for row in closing[2:]] == ["1", "2"]


def test_table_is_drawn_to_scale(capsys):
    record = {"setup_seconds": 0, "std_seconds": 0.0, "speedup": None}
    fast = {"implementation": "a", "mean_seconds": 0.5, "trial_seconds": [0.4, 0.6]}
    slow = {"implementation": "b", "mean_seconds": 1.0, "trial_seconds": [1.0, 1.0]}
    numerical.print_table([{**record, **fast, "std_seconds": 0.14}, {**record, **slow}])
    output = capsys.readouterr().out
    assert (
        output.splitlines()[1].count("█") * 2 == output.splitlines()[2].count("█") > 0
    )
    assert "0.5000 ± 0.1400" in output and "0.4000 … 0.6000" in output
    assert re.search("^a varies by over 10%: ", output, re.MULTILINE)
    assert "b varies" not in output
    assert "a is 2.00x as fast as b" in output


@pytest.mark.parametrize("script", SIZES)
def test_help_shows_defaults_without_heavy_imports(script):
    code = f"import sys, {script}; sys.argv = ['x', '--help']\ntry: {script}.main()\nfinally: "
    code += "assert not {'ray', 'tensorflow', 'scipy.signal'} & set(sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    flags = re.findall(r"^  (--[\w-]+)", done.stdout, re.MULTILINE)
    assert len(flags) >= 8 and done.stdout.count("(default:") >= 8


@pytest.mark.parametrize(
    "flags",
    [
        "--num-cpus 0",
        "--num-cpus 2 -1",
        "--num-cpus 100000",
        "--num-trials 0",
        "--num-trials 1.5",
        "--num-warmups -1",
        "--num-warmups x",
        "--seed -3",
        "--image-size 0",
        "--filter-size 99999999999",
        "--implementations fast",
        "--implementations ray ray",
        "--bogus",
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags):
    error = run("numerical", *flags.split(), status=2).stderr
    assert re.fullmatch(r"numerical\.py: error: .+\n", error)


def test_wrong_input_is_refused_in_one_line(made, tmp_path):
    folder = made[0]
    (tmp_path / "half.keras").write_bytes((folder / "model.keras").read_bytes()[:9999])
    np.save(tmp_path / "floats.npy", np.zeros((9, 28, 28)))
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    for script, *flags in [
        ("numerical", "--image-size", 900000),
        ("stateful", "--words-per-document", 1000000, "--word-length", 1000000),
        ("expensive_init", "--images-path", "/nonexistent.npy"),
        ("expensive_init", "--images-path", tmp_path / "floats.npy"),
        ("expensive_init", "--images-path", tmp_path / "pickled.npy"),
        (
            "expensive_init",
            "--images-path",
            folder / "images.npy",
            "--batch-size",
            1001,
        ),
        ("save_model", "--folder", tmp_path, "--data", "/nonexistent.npz"),
        ("save_model", "--folder", tmp_path, "--data", tmp_path / "floats.npy"),
    ]:
        error = run(script, *flags, status=1).stderr
        assert re.fullmatch(rf"{script}\.py: error: .+\n", error)
    assert not list(tmp_path.glob(".save_model*"))


@pytest.mark.parametrize(
    ("script", "name", "old", "new"),
    [
        ("numerical", "ray", "return ray.get(", "return 2 * ray.get("),
        (
            "stateful",
            "multiprocessing-tuned",
            "    return counter.popular()\n\n\ndef run_multiprocessing_tuned",
            "    return set()\n\n\ndef run_multiprocessing_tuned",
        ),
        (
            "expensive_init",
            "multiprocessing",
            "return Classifier(*arguments).classify(batch)",
            "return Classifier(*arguments).classify(batch) + 1",
        ),
    ],
)
def test_wrong_result_is_an_error(script, name, old, new, tmp_path, made):
    folder = changed(script, tmp_path, old, new)
    flags = ["--implementations", "serial", name, *QUICK, *sizes(script, made)]
    error = run(script, *flags, status=1, cwd=folder).stderr
    assert error == f"{script}.py: error: {name} differs from serial\n"


@pytest.mark.parametrize("name", NAMES)
def test_error_in_the_workload_reaches_the_user(name, tmp_path):
    folder = changed(
        "numerical", tmp_path, "    # Contiguous:", "    raise OSError('boom')\n    #"
    )
    flags = ["--implementations", name, *SIZES["numerical"]]
    assert (
        run("numerical", *flags, status=1, cwd=folder).stderr
        == "numerical.py: error: boom\n"
    )


# ---- save_model.py ----
def test_save_model(made, tmp_path):
    folder, printed, arrays = made
    run("save_model", "--data", folder / "small.npz", "--folder", tmp_path)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    tf = save_model.import_tensorflow()
    first, second = (
        tf.keras.models.load_model(f / "model.keras") for f in (folder, tmp_path)
    )
    for one, other in zip(first.get_weights(), second.get_weights()):
        np.testing.assert_array_equal(one, other)
    images = np.load(folder / "images.npy")
    np.testing.assert_array_equal(images, arrays["x_test"])
    labels = first.predict(images, verbose=0).argmax(axis=1)
    accuracy = (labels == arrays["y_test"]).mean()
    assert accuracy > 0.9
    assert f"{accuracy:.4f}" in printed


def test_save_model_without_network(tmp_path):
    # A proxy that nobody runs, and no cache: as on a closed network.
    proxy = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path)}
    flags = ["--num-images", "6000", "--folder", tmp_path]
    done = run("save_model", *flags, env={**os.environ, **proxy})
    assert re.fullmatch(
        "using synthetic images, as MNIST is not there: .+\n", done.stderr
    )
    assert float(re.search(r"10000 test images: ([\d.]+)", done.stdout)[1]) > 0.9
    assert np.load(tmp_path / "images.npy").shape == (10000, 28, 28)


# ---- the shape of the house ----
def required_packages(script):
    """Return the requirements in the PEP 723 block: {name: whole line}."""
    block = (HERE / f"{script}.py").read_text().split("# ///\n")[0]
    lines = re.findall(r'"([^"]+)"', block.split("dependencies")[1])
    return {re.match(r"\w+", line)[0]: line for line in lines}


def test_pep_723_blocks_agree_with_requirements():
    lines = (HERE / "requirements.txt").read_text().splitlines()
    needed = set()
    for script in [*SIZES, "save_model"]:
        packages = required_packages(script)
        assert set(packages.values()) <= set(lines)
        text = (HERE / f"{script}.py").read_text()
        assert text.startswith('# /// script\n# requires-python = ">=3.10,<3.14"\n')
        if script in SIZES:
            assert f"PACKAGES = {sorted(packages)}".replace("'", '"') in text
        needed |= set(packages.values())
    assert needed == {line for line in lines if not line.startswith("#")}


def test_timing_and_reporting_are_identical():
    texts = [(HERE / f"{script}.py").read_text() for script in SIZES]
    parts = {text.partition("\n# ---- timing and reporting")[2] for text in texts}
    assert len(parts) == 1 and "def compare(" in parts.pop()
    assert all(len(text.splitlines()) <= 400 for text in texts)


# ---- faults ----
def start(script, *flags):
    """Start a script in a session of its own; return it once it has begun its trials."""
    command = [sys.executable, "-u", str(HERE / f"{script}.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def wait_for(process, pattern, count=2):
    """Return the descendants whose command line fits `pattern`, once `count` do."""
    deadline = time.time() + 60
    while time.time() < deadline:
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                if re.search(pattern, " ".join(child.cmdline())):
                    found.append(child)
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise TimeoutError(pattern)


WORKERS = {"multiprocessing": "spawn_main", "ray": "^ray::"}


@pytest.mark.parametrize(
    ("script", "name", "pattern", "status", "message"),
    [
        (
            "numerical",
            "multiprocessing",
            "spawn_main",
            1,
            "multiprocessing: a worker died",
        ),
        ("stateful", "multiprocessing-tuned", "spawn_main", 1, "-tuned: a worker died"),
        ("numerical", "ray", "^ray::filter_image", 0, ""),
        ("stateful", "ray", "^ray::PrefixCounter.add", 1, "its state is lost"),
        ("stateful", "ray", "raylet/raylet", 1, "ray: "),
    ],
)
def test_killed_worker(script, name, pattern, status, message):
    large = {
        "numerical": ["--image-size", "2000"],
        "stateful": ["--num-documents", "5"],
    }
    flags = ["--implementations", name, "--num-trials", "12", "--num-cpus", "2"]
    process = start(script, *flags, *large[script])
    if pattern == "raylet/raylet":
        wait_for(process, "^ray::PrefixCounter.add")
    victim = wait_for(process, pattern, count=1)[0]
    time.sleep(1 if pattern == "spawn_main" else 0)  # past set-up
    victim.kill()
    output, error = process.communicate(timeout=60)
    assert process.returncode == status, output + error
    assert message in error and len(error.splitlines()) == (status != 0)
    assert ("All results agree." in output) == (status == 0)


def test_killed_actor_loads_again(made):
    flags = [
        "--implementations",
        "serial",
        "ray",
        "--num-trials",
        "12",
        "--num-cpus",
        "2",
    ]
    process = start(
        "expensive_init", *flags, *sizes("expensive_init", made), "--num-batches", 300
    )
    wait_for(process, "^ray::Classifier.classify", count=1)[0].kill()
    output, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (0, ""), output + error
    assert "All results agree." in output


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_cleanly(name, number):
    process = start("numerical", "--implementations", name, "--num-trials", "1000")
    if name != "serial":
        wait_for(process, "^ray::filter_image" if name == "ray" else "spawn_main")
    time.sleep(1)
    # A terminal's Ctrl-C goes to every process of the group.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    _, error = process.communicate(timeout=15)
    assert error == ""
    assert process.returncode == 130 if number == signal.SIGINT else process.returncode


def test_closed_stdout():
    process = start("numerical", "--implementations", "serial", *SIZES["numerical"])
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) and process.stderr.read() == ""
    process.stderr.close()


# ---- a cluster ----
def test_cluster_config_is_valid():
    util = pytest.importorskip("ray.autoscaler._private.util")
    yaml = pytest.importorskip("yaml")  # Ray brings it
    variants = re.findall(r"```yaml\n(provider:.*?)```", README.read_text(), re.DOTALL)
    assert len(variants) == 1  # GCP
    for changes in [{}, *map(yaml.safe_load, variants)]:
        config = {**yaml.safe_load((HERE / "config.yaml").read_text()), **changes}
        util.validate_config(util.prepare_config(config))
        shipped = [path for path in config["file_mounts"].values() if path[0] != "~"]
        assert all((HERE / path).is_file() for path in shipped)
        assert set(shipped) == {"requirements.txt", "save_model.py"}
        assert "-r ~/requirements.txt" in " ".join(config["setup_commands"])


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Start a cluster of two nodes, with 2 CPUs and 1, behind a token of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    head = ["--head", "--port", address.split(":")[1], "--num-cpus", "2"]
    head += ["--include-dashboard", "false", "--temp-dir", tempfile.mkdtemp(dir="/tmp")]
    nodes = []
    try:
        for flags in (head, ["--address", address, "--num-cpus", "1"]):
            nodes.append(
                subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
            )
            assert any("Ray runtime started" in line for line in nodes[-1].stdout)
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield address
        assert [node.poll() for node in nodes] == [None, None]
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.communicate()
        shutil.rmtree(head[-1])


def test_cluster_of_two_nodes_is_joined(cluster, made):
    joining = f"joining the Ray cluster at {cluster}\n"
    for script in SIZES:
        flags = ["--implementations", "serial", "ray", "--num-cpus", "3", *QUICK]
        done = run(script, *flags, *sizes(script, made))
        assert done.stderr.startswith(joining)
        assert "All results agree." in done.stdout
    flags = ["--implementations", "ray", "--num-cpus", "4"]
    error = run("numerical", *flags, status=1).stderr
    assert (
        error == joining + "numerical.py: error: 4 workers, but Ray has only 3 CPUs\n"
    )


def test_dead_address_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    error = run("numerical", "--implementations", "ray", status=1).stderr
    assert "numerical.py: error: it does not answer: unset RAY_ADDRESS" in error
