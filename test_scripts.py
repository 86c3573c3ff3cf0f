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
import resource
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

import save_model

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ["serial", "multiprocessing", "multiprocessing-tuned", "ray"]
SIZES = {
    "numerical": "--image-size 300",
    "stateful": "--num-documents 3 --words-per-document 2000",
    "expensive_init": "--num-batches 3 --batch-size 400",
}
QUICK = "--num-trials 2 --num-warmups 0"


def run(script, flags, status=0, cwd=HERE, **options):
    """Run a script to its end; return the finished process, its output as text."""
    command = [sys.executable, f"{cwd}/{script}.py", *flags.split()]
    options |= {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def source(script):
    return (HERE / f"{script}.py").read_text()


def changed(script, folder, old, new):
    """Write a copy of the script with `old` replaced by `new`; return its folder."""
    assert old in source(script)
    (folder / f"{script}.py").write_text(source(script).replace(old, new))
    return folder


def marked_processes(mark):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TEST_MARK") == mark:
                yield process


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """Fail a test that leaves a process, a shared-memory segment or a temporary file."""
    mark = secrets.token_hex()
    monkeypatch.setenv("TEST_MARK", mark)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folders = [pathlib.Path(path) for path in ("/dev/shm", "/tmp")]
    before = {path for folder in folders for path in folder.glob("*")}
    yield
    deadline = time.time() + 10
    while (left := list(marked_processes(mark))) and time.time() < deadline:
        time.sleep(0.1)
    assert not left
    after = {path for folder in folders for path in folder.glob("*")}
    assert {path for path in after - before if "pytest" not in path.name} == set()


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Run save_model.py on a small file; return its folder, arrays, output and flags."""
    folder = tmp_path_factory.mktemp("made")
    x_train, y_train, x_test, y_test = save_model.make_synthetic()
    arrays = {"x_train": x_train[:8000], "y_train": y_train[:8000]}
    arrays |= {"x_test": x_test[:1000], "y_test": y_test[:1000]}
    np.savez(folder / "small.npz", **arrays)
    printed = run("save_model", f"--data {folder}/small.npz --folder {folder}").stdout
    paths = f" --model-path {folder}/model.keras --images-path {folder}/images.npy"
    flags = SIZES | {"expensive_init": SIZES["expensive_init"] + paths}
    return folder, arrays, printed, flags


# ---- the workloads, against independent answers ----
PROBE = """
if __name__ == "__main__":
    import pickle
    args = argparse.Namespace(**json.loads(sys.argv[1]))
    answers = {n: run_apart(n, args, args.num_cpus, None)[2] for n in args.names}
    pickle.dump((make_inputs(args, args.num_cpus), answers), open(sys.argv[2], "wb"))
"""


def probe(script, folder, **args):
    """Return the inputs and, of every implementation, the answer that two passes gave."""
    text = source(script).rpartition("\nif __name__")[0] + PROBE
    (folder / f"{script}.py").write_text(text)
    args = {"seed": 1, "num_cpus": 3, "num_warmups": 1, "num_trials": 1} | args
    flags = json.dumps({"names": NAMES} | args, separators=(",", ":"))
    run(script, f"{flags} {folder}/out", cwd=folder)
    return pickle.loads((folder / "out").read_bytes())


def test_numerical_answers(tmp_path):
    inputs, answers = probe("numerical", tmp_path, image_size=21, filter_size=4)
    padded, expected = np.pad(inputs[0], 3), []
    for kernel in inputs[1]:
        # Convolution turns the kernel around: image[i - a, j - b] * kernel[a, b].
        full = np.empty((24, 24))
        for i, j in np.ndindex(full.shape):
            full[i, j] = sum(
                padded[i + 3 - a, j + 3 - b] * kernel[a, b]
                for a, b in np.ndindex(kernel.shape)
            )
        expected.append(full[::5, ::5])
    for name in NAMES:
        np.testing.assert_allclose(answers[name], expected, rtol=1e-12)


@pytest.mark.parametrize("length", [6, 1])  # words of one byte have no proper prefix
def test_stateful_answers(length, tmp_path):
    sizes = {"num_documents": 4, "words_per_document": 1000, "word_length": length}
    (batches, _), answers = probe("stateful", tmp_path, **sizes)
    words = [word for batch in batches for document in batch for word in document]
    assert len(words) == 4 * 3 * 1000 and {*map(len, words)} == {length}
    counts = collections.Counter(word[:i] for word in words for i in range(1, length))
    expected = {prefix for prefix, count in counts.items() if count > 3}
    assert 0 < len(expected) < len(counts) or length == 1
    assert answers == dict.fromkeys(NAMES, expected)


def test_expensive_init_answers(tmp_path, made):
    folder, arrays, *_ = made
    paths = {"model_path": f"{folder}/model.keras"}
    paths["images_path"] = f"{folder}/images.npy"
    # test_json_tables_and_sweep[expensive_init] sees that the other two agree.
    names = ["serial", "multiprocessing-tuned"]
    sizes = {"num_cpus": 2, "num_batches": 2, "batch_size": 300, "names": names}
    (places, *_), answers = probe("expensive_init", tmp_path, **sizes, **paths)
    starts = [int(place * 701) for place in places]  # of the 1000 images
    labels = [arrays["y_test"][start : start + 300] for start in starts]
    assert len(labels) == 4 and (np.array(answers["serial"]) == labels).mean() > 0.9
    np.testing.assert_array_equal(*answers.values())


# ---- the command line ----
@pytest.mark.parametrize("script", SIZES)
def test_json_tables_and_sweep(script, made):
    counts = [1, 2] if script == "stateful" else [2]  # as it takes the least time
    flags = f"--num-cpus {' '.join(map(str, counts))} --json {QUICK}"
    done = run(script, f"{flags} {made[-1][script]}")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    runs = [(record["num_cpus"], record["implementation"]) for record in records]
    assert runs == [(num_cpus, name) for num_cpus in counts for name in NAMES]
    rows = re.findall(r"^[a-z-]+ +[\d.]+ +[\d.]+ ± .*$", done.stderr, re.MULTILINE)
    serials = [record for record in records[::4] for _ in NAMES]
    for record, serial, row in zip(records, serials, rows, strict=True):
        seconds, mean = record["trial_seconds"], record["mean_seconds"]
        assert len(seconds) == 2 and min(seconds) > 0
        assert record["benchmark"] == script and mean == statistics.mean(seconds)
        assert record["std_seconds"] == statistics.stdev(seconds)
        assert record["speedup"] == serial["mean_seconds"] / mean
        assert {"seed", *flag_names(script)} == set(record["parameters"])
        facts = {*required_packages(script), "python", "platform", "physical_cores"}
        assert set(record["environment"]) == facts
        figures = record["setup_seconds"], mean, record["std_seconds"], *sorted(seconds)
        printed = [float(figure) for figure in re.findall(r"\d+\.\d+", row)]
        assert printed == pytest.approx([*figures, record["speedup"]], abs=0.006)
        assert row.count("█") == round(5 * mean / serial["mean_seconds"])
        assert ("varies over 10%" in row) == (record["std_seconds"] > 0.1 * mean)
    assert done.stderr.count("All results agree.") == len(counts)
    means = [(r["mean_seconds"], r["implementation"]) for r in records[:4]]
    fast, *_, slow = sorted(means)
    assert f"Fastest: {fast[1]}, " in done.stderr
    assert f", {slow[0] / fast[0]:.2f}x as fast as {slow[1]}. All" in done.stderr
    *_, title, one, two = done.stderr.splitlines()
    assert (title.split()[:5] == ["workers", *NAMES]) == (len(counts) == 2)
    for num_cpus, line in enumerate([one, two] if len(counts) == 2 else [], 1):
        means = [r["mean_seconds"] for r in records if r["num_cpus"] == num_cpus]
        assert line.split() == [str(num_cpus), *(f"{mean:.4f}" for mean in means)]


def test_table_on_stdout_and_progress_on_a_terminal():
    flags = f"--implementations multiprocessing-tuned serial {SIZES['numerical']}"
    done = run("numerical", flags)
    row = r"^(serial|multiproc\S+) .* \d\.\d\dx  █*(?: varies.*)?$"
    rows = re.findall(row, done.stdout, re.MULTILINE)
    assert rows == ["serial", "multiprocessing-tuned"] and done.stderr == ""
    pty, terminal = os.openpty()
    command = [sys.executable, f"{HERE}/numerical.py", *flags.split()]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal, check=True)
    assert b"serial: pass 10\x1b[K\r" in os.read(pty, 9999)
    os.close(pty), os.close(terminal)


@pytest.mark.parametrize("script", SIZES)
def test_help_shows_defaults_without_heavy_imports(script):
    code = f"import sys, {script}; sys.argv = ['x', '--help']\ntry: {script}.main()\n"
    code += "finally: assert not {'ray', 'tensorflow', 'scipy.signal'} & {*sys.modules}"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True)
    flags = re.findall(r"^  (--[\w-]+)", output, re.MULTILINE)
    assert len(flags) >= 8 and output.count("(default:") == len(flags)


WRONG = "--num-cpus 0|--num-cpus 2 -1|--num-cpus 100000|--num-trials 0|--num-trials 1.5"
WRONG += "|--num-warmups -1|--num-warmups x|--seed -3|--image-size 0|--bogus"
WRONG += "|--filter-size 9999999|--implementations fast|--implementations ray ray"


@pytest.mark.parametrize("flags", WRONG.split("|"))
def test_wrong_flags_are_refused_in_one_line(flags):
    error = run("numerical", flags, status=2).stderr
    assert re.fullmatch(r"numerical\.py: error: .+\n", error)


def test_wrong_input_is_refused_in_one_line(made, tmp_path):
    np.save(tmp_path / "floats.npy", np.zeros((9, 28, 28)))
    np.savez(tmp_path / "three.npz", x_train=[1], y_train=[1], x_test=[1])
    no_model = "--model-path /none --implementations"
    for script, flags in [
        ("numerical", "--image-size 900000"),
        ("stateful", "--words-per-document 1000000 --word-length 1000000"),
        ("expensive_init", f"{no_model} multiprocessing-tuned"),
        ("expensive_init", f"{no_model} ray"),
        ("save_model", f"--folder {tmp_path} --data /none"),
        ("save_model", f"--folder {tmp_path} --data {tmp_path}/floats.npy"),
        ("save_model", f"--folder {tmp_path} --data {tmp_path}/three.npz"),
    ]:
        error = run(script, f"{made[-1].get(script, '')} {flags}", status=1).stderr
        assert re.fullmatch(rf"{script}\.py: error: .+\n", error), flags
    assert run("save_model", "--folder /none", status=2).stderr.count("\n") == 1
    assert not list(tmp_path.glob(".save_model*"))


def test_image_larger_than_the_object_store_is_refused(monkeypatch):
    share = 1.5e8 / psutil.virtual_memory().available
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION", str(share))
    error = run("numerical", "--implementations ray --image-size 6000", status=1).stderr
    problem = "no room in Ray's object store: lower --image-size"
    assert error == f"numerical.py: error: {problem}\n"


CLASSIFIERS = """
import json, sys, expensive_init
for arguments in json.loads(sys.argv[1]):
    try:
        print("accepted", expensive_init.Classifier(*arguments).images.shape)
    except OSError as error:
        print(error)
"""


def test_wrong_model_or_images_are_refused_in_one_line(made, tmp_path):
    model, images = made[0] / "model.keras", made[0] / "images.npy"
    keras = save_model.import_tensorflow().keras
    np.save(tmp_path / "floats.npy", np.zeros((9, 28, 28)))
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "half.npy").write_bytes(images.read_bytes()[:9999])
    (tmp_path / "half.keras").write_bytes(model.read_bytes()[:9999])
    layer = keras.layers.Lambda(lambda images: images)
    keras.Sequential([keras.Input((28, 28)), layer]).save(tmp_path / "lambda.keras")
    layers = [keras.Input((9,)), keras.layers.Dense(10)]
    keras.Sequential(layers).save(tmp_path / "flat.keras")
    names = ["floats.npy", "pickled.npy", "half.npy", "none.npy"]
    cases = [(model, tmp_path / name, 9) for name in names] + [(model, images, 1001)]
    names = ["half.keras", "lambda.keras", "flat.keras", "none.keras"]
    cases += [(tmp_path / name, images, 9) for name in names] + [(model, images, 1000)]
    command = [sys.executable, "-c", CLASSIFIERS, json.dumps(cases, default=str)]
    *lines, last = subprocess.check_output(command, cwd=HERE, text=True).splitlines()
    assert last == "accepted (1000, 28, 28)" and len(lines) == len(cases) - 1
    for (model, images, _), line in zip(cases, lines):
        start = re.escape(f"{os.uname().nodename}: {images}, {model}: ")
        assert re.fullmatch(start + ".+; run save_model.py", line)


def test_odd_sizes_work():
    # A filter larger than the image; more workers than first bytes.
    run("numerical", f"--image-size 3 --filter-size 9 --implementations serial {QUICK}")
    flags = "--num-cpus 257 --num-documents 1 --words-per-document 9 --implementations"
    error = run("stateful", f"{flags} serial {QUICK}").stderr
    assert error == "256 first bytes keep 256 workers busy; the others idle\n"


WRONG_RESULTS = {
    ("numerical", "multiprocessing"): ("return pool.map(", "return 2 * pool.map("),
    ("stateful", "multiprocessing-tuned"): ("calls][-num_cpus:]", "calls][-1:]"),
}


@pytest.mark.parametrize(("script", "name"), WRONG_RESULTS)
def test_wrong_result_is_an_error(script, name, tmp_path):
    changed(script, tmp_path, *WRONG_RESULTS[script, name])
    flags = f"--implementations serial {name} {QUICK} {SIZES[script]}"
    error = run(script, flags, status=1, cwd=tmp_path).stderr
    problem = "differs from the first implementation's result"
    assert error == f"{script}.py: error: {name} {problem}\n"


@pytest.mark.parametrize("name", NAMES)
def test_error_in_the_workload_reaches_the_user(name, tmp_path):
    boom = "    raise OSError('boom')\n    # Contiguous:"
    changed("numerical", tmp_path, "    # Contiguous:", boom)
    flags = f"--implementations {name} {SIZES['numerical']}"
    error = run("numerical", flags, status=1, cwd=tmp_path).stderr
    assert error == "numerical.py: error: boom\n"


# ---- save_model.py ----
def test_save_model(made, tmp_path):
    folder, arrays, printed, _ = made
    run("save_model", f"--data {folder}/small.npz --folder {tmp_path}")
    load_model = save_model.import_tensorflow().keras.models.load_model
    first, second = (load_model(path / "model.keras") for path in (folder, tmp_path))
    for one, other in zip(first.get_weights(), second.get_weights()):
        np.testing.assert_array_equal(one, other)
    images = np.load(folder / "images.npy")
    np.testing.assert_array_equal(images, arrays["x_test"])
    labels = first.predict(images, verbose=0).argmax(axis=1)
    accuracy = (labels == arrays["y_test"]).mean()
    assert accuracy > 0.9 and f"{accuracy:.4f}" in printed


def test_failed_save_keeps_the_old_model(made, tmp_path):
    shutil.copy(made[0] / "model.keras", tmp_path)
    limit = (100_000, 100_000)  # bytes a file, as on a full disk

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    flags = f"--data {made[0]}/small.npz --folder {tmp_path}"
    error = run("save_model", flags, status=1, preexec_fn=small_disk).stderr
    assert re.fullmatch(r"save_model\.py: error: .+\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]
    old, kept = made[0] / "model.keras", tmp_path / "model.keras"
    assert old.read_bytes() == kept.read_bytes()


def test_save_model_without_network(tmp_path):
    # A proxy that nobody runs, and no cache: as on a closed network.
    closed = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path)}
    flags = f"--num-images 6000 --folder {tmp_path}"
    done = run("save_model", flags, env={**os.environ, **closed})
    reason = "using synthetic images, as MNIST is not there: .+\n"
    assert re.fullmatch(reason, done.stderr)
    assert float(re.search(r"10000 test images: ([\d.]+)", done.stdout)[1]) > 0.9
    assert np.load(tmp_path / "images.npy").shape == (10000, 28, 28)


# ---- the shape of the house ----
def flag_names(script):
    """Return the names of the size flags, as a run's parameters have them."""
    names = re.findall(r"--([\w-]+)", SIZES[script])
    names += {"numerical": ["filter_size"], "stateful": ["word_length"]}.get(script, [])
    paths = ["model_path", "images_path"] if script == "expensive_init" else []
    return [name.replace("-", "_") for name in names + paths]


def required_packages(script):
    """Return the requirements in the PEP 723 block: {name: whole line}."""
    block = source(script).split("# ///\n")[0].split("dependencies")[1]
    return {re.match(r"\w+", line)[0]: line for line in re.findall(r'"([^"]+)"', block)}


def test_pep_723_blocks_agree_with_requirements():
    lines, needed = (HERE / "requirements.txt").read_text().splitlines(), set()
    for script in [*SIZES, "save_model"]:
        packages = required_packages(script)
        start = '# /// script\n# requires-python = ">=3.10,<3.14"\n'
        assert source(script).startswith(start)
        if script in SIZES:
            assert json.dumps(sorted(packages)) in source(script)
        needed |= set(packages.values())
    assert needed == {line for line in lines if not line.startswith("#")}


def test_timing_and_reporting_are_identical():
    parts = {source(script).partition("\n# ---- timing and")[2] for script in SIZES}
    assert len(parts) == 1 and "def measure(" in parts.pop()


# ---- faults ----
def start(script, flags, **more):
    """Start a script in a session of its own, as a terminal would."""
    command = [sys.executable, "-u", f"{HERE}/{script}.py", *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes, **more)


def ignore_sigint():  # as a shell does for what it starts in the background
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def wait_for(process, pattern, count=1):
    """Return the descendants whose command line fits `pattern`, once `count` do.

    Children are not among them: those are multiprocessing's tracker, and the process
    that measures.
    """
    deadline = time.time() + 60
    while time.time() < deadline:
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children():
                for worker in child.children(recursive=True):
                    if re.search(pattern, " ".join(worker.cmdline())):
                        found.append(worker)
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise TimeoutError(pattern)


KILLED = [
    ("numerical", "multiprocessing", "spawn_main", "multiprocessing: a process died"),
    ("stateful", "multiprocessing-tuned", "spawn_main", "tuned: a process died"),
    ("numerical", "ray", "^ray::filter_image", None),
    ("expensive_init", "ray", "^ray::Classifier.classify", None),
    ("stateful", "ray", "^ray::PrefixCounter.add", "ray failed, with its state: "),
    ("numerical", "ray", r"^\S+/raylet/raylet ", "error: ray: a process died"),
    ("expensive_init", "ray", r"^\S+/gcs/gcs_server ", "error: ray: a process died"),
]


@pytest.mark.parametrize(("script", "name", "pattern", "message"), KILLED)
def test_killed_process(script, name, pattern, message, made):
    more = {"numerical": "--image-size 2000", "stateful": "--words-per-document 12000"}
    more["expensive_init"] = "--num-batches 200"
    names = f"{name} --num-trials 20" if message else f"serial {name} --num-trials 2"
    flags = f"{made[-1][script]} {more[script]} --num-cpus 2 --implementations {names}"
    process = start(script, f"{flags} --num-warmups 0")
    wait_for(process, "^ray::(filt|Pref|Clas)" if name == "ray" else pattern, count=2)
    if message:  # a second after its workers are there, a run has begun its trials
        time.sleep(1)
    wait_for(process, pattern)[0].kill()
    output, error = process.communicate(timeout=60)
    assert process.returncode == (message is not None), output + error
    assert (message or "") in error and len(error.splitlines()) == (message is not None)
    assert ("All results agree." in output) == (message is None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_cleanly(name, number):
    flags = f"--implementations {name} --num-trials 1000"
    process = start("numerical", flags, preexec_fn=ignore_sigint)
    if name != "serial":
        wait_for(process, "^ray::filter_image" if name == "ray" else "spawn_main", 2)
    time.sleep(1)
    if number == signal.SIGINT:  # which a terminal sends to the whole group
        os.killpg(process.pid, number)
    else:
        process.terminate()
    _, error = process.communicate(timeout=15)
    assert error == ""
    assert process.returncode == 130


@pytest.mark.parametrize("script", [*SIZES, "save_model"])
def test_ctrl_c_while_importing(script):
    command = [sys.executable, "-X", "importtime", f"{HERE}/{script}.py"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    assert any("argparse" in line for line in process.stderr)  # the first of many
    process.send_signal(signal.SIGINT)
    lines = process.stderr.read().splitlines()
    assert [line for line in lines if not line.startswith("import time:")] == []
    assert process.wait() == 130


def test_sigterm_while_training(made, tmp_path):
    process = start("save_model", f"--data {made[0]}/small.npz --folder {tmp_path}")
    assert process.stdout.readline().startswith("training on")
    process.terminate()
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 130
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_set_up():
    process = start("numerical", "--implementations ray")
    wait_for(process, "default_worker", count=2)  # which do not know the raylet yet
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 130


def test_worker_that_cannot_start_ends_the_run(tmp_path):
    old, new = "    ready.wait()\n\n\ndef filter", "    os._exit(3)\n\n\ndef filter"
    changed("numerical", tmp_path, old, new)
    flags = f"--implementations multiprocessing-tuned {SIZES['numerical']}"
    error = run("numerical", flags, status=1, cwd=tmp_path).stderr
    message = "multiprocessing-tuned: a process died; run it again"
    assert error == f"numerical.py: error: {message}\n"


def test_closed_stdout():
    process = start("numerical", f"--implementations serial {SIZES['numerical']}")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) and process.stderr.read() == ""


# ---- a cluster ----
def test_cluster_config_is_valid():
    util = pytest.importorskip("ray.autoscaler._private.util")
    yaml = pytest.importorskip("yaml")  # Ray brings it
    readme = (HERE / "README.md").read_text()
    variants = re.findall(r"```yaml\n(provider:.*?)```", readme, re.DOTALL)
    assert len(variants) == 1  # GCP
    for changes in [{}, *map(yaml.safe_load, variants)]:
        config = yaml.safe_load((HERE / "config.yaml").read_text()) | changes
        util.validate_config(util.prepare_config(config))
        shipped = {path for path in config["file_mounts"].values() if path[0] != "~"}
        assert shipped == {"requirements.txt", "save_model.py"}
        assert "-r ~/requirements.txt" in " ".join(config["setup_commands"])


@pytest.fixture
def cluster(monkeypatch):
    """Start a cluster of two nodes, with 2 CPUs and 1, behind a token of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    folder, nodes = tempfile.mkdtemp(dir="/tmp"), []
    head = f"--head --port {address[10:]} --num-cpus 2 --temp-dir {folder} --include-dashboard false"
    try:
        for flags in (head, f"--address {address} --num-cpus 1"):
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
            command += flags.split()
            nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert any("Ray runtime started" in line for line in nodes[-1].stdout)
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield address, nodes
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.communicate()
        shutil.rmtree(folder)


def test_cluster_of_two_nodes(cluster, made):
    address, nodes = cluster
    joining = f"only ray joins {address} (or unset RAY_ADDRESS, ray stop)\n"
    for script in SIZES:  # three workers need both nodes
        flags = f"--implementations serial ray --num-cpus 3 {QUICK} {made[-1][script]}"
        done = run(script, flags)
        assert done.stderr.startswith(joining) and "All results agree." in done.stdout
    error = run("numerical", "--implementations ray --num-cpus 4", status=1).stderr
    too_few = "numerical.py: error: 4 workers, but Ray has only 3 CPUs\n"
    assert error == joining + too_few
    assert [node.poll() for node in nodes] == [None, None]
    process = start("numerical", "--implementations ray --num-cpus 3 --num-trials 1000")
    time.sleep(8)  # it is in its trials then, or nearly
    for child in psutil.Process(nodes[1].pid).children():
        if "raylet/raylet" in " ".join(child.cmdline()):
            child.kill()
    died = "numerical.py: error: ray: a process died; run it again\n"
    assert process.communicate(timeout=60)[1] == joining + died
    assert process.returncode == 1


def test_dead_address_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    error = run("numerical", "--implementations ray", status=1).stderr
    joining = "only ray joins 127.0.0.1:9 (or unset RAY_ADDRESS, ray stop)\n"
    assert error == joining + "numerical.py: error: [Errno 111] Connection refused\n"
