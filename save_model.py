# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["numpy>=1.26,<3", "tensorflow>=2.18,<3"]
# ///
"""Train the model that expensive_init.py loads, and save it with the test images.

Trains Flatten, Dense(512, relu), Dropout(0.2), Dense(10, softmax) for one epoch with
Adam on MNIST, prints the accuracy on the test images, and writes model.keras and
images.npy (the test images, uint8, (N, 28, 28)) beside this script. Where MNIST cannot
be downloaded it trains on synthetic images of the same shape.

Run: python save_model.py, or, with nothing installed but uv, uv run save_model.py.
Two runs give the same weights, so every node of a cluster can make its own copy.
"""

import os
import signal
import sys


def stop(*_):
    """End with status 130, without a traceback; a second Ctrl-C cannot disturb it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(130)


if __name__ == "__main__":  # at once, as the imports below take their time
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

import argparse
import socket
import tempfile
import zipfile

import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
ERROR = "save_model.py: error:"


def import_tensorflow():
    """Import TensorFlow without its start-up lines."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a GPU would give other weights
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors become exceptions
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)  # the lines written before TensorFlow heeds its log level
    try:
        import tensorflow as tf
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
    return tf


def check(images, labels):
    """Raise ValueError unless images are uint8 (N, 28, 28) and labels (N,), 0 to 9."""
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or not len(images):
        raise ValueError("--data: its images are not uint8, (N, 28, 28)")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError("--data: its labels are not whole numbers, one per image")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError("--data: its labels are not from 0 to 9")


def load_npz(path):
    """Return x_train, y_train, x_test, y_test of a file laid out like Keras' mnist.npz.

    Raises ValueError if it is no such file.
    """
    try:
        with np.load(path) as arrays:
            data = [arrays[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    except (OSError, EOFError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"--data: {path} is no such .npz file: {error}") from error
    check(*data[:2])
    check(*data[2:])
    return data


def make_synthetic():
    """Return arrays shaped like MNIST's: ten random patterns in heavy noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 48, (10, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 70000)
    images = rng.integers(0, 208, (70000, 28, 28), dtype=np.uint8) + patterns[labels]
    return images[:60000], labels[:60000], images[60000:], labels[60000:]


def get_mnist(keras):
    """Return (name, arrays): MNIST, or synthetic images if it cannot be downloaded."""
    socket.setdefaulttimeout(30)  # or a network that drops packets would hang us
    try:
        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
        return "MNIST", (x_train, y_train, x_test, y_test)
    except Exception as error:  # noqa: BLE001 (Keras raises nothing more specific)
        print(
            f"using synthetic images, as MNIST is not there: {error}", file=sys.stderr
        )
        return "synthetic", make_synthetic()


def train(tf, images, labels):
    """Return the trained model: scaling is a layer, so that nobody can forget it."""
    keras = tf.keras
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    layers = [
        keras.Input((28, 28)),
        keras.layers.Rescaling(1 / 255),
        keras.layers.Flatten(),
        keras.layers.Dense(512, activation="relu"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(10, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    loss = "sparse_categorical_crossentropy"
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    model.fit(images, labels, epochs=1, verbose=0)
    return model


def run(args):
    """Train, evaluate and save; neither file is replaced unless both could be written."""
    with tempfile.TemporaryDirectory(prefix=".save_model-", dir=args.folder) as new:
        data = args.data and (args.data, load_npz(args.data))
        tempfile.tempdir = new  # where Keras leaves files when it fails to save
        tf = import_tensorflow()
        name, (x_train, y_train, x_test, y_test) = data or get_mnist(tf.keras)
        x_train, y_train = x_train[: args.num_images], y_train[: args.num_images]
        print(f"training on {len(x_train)} images ({name})", flush=True)
        model = train(tf, x_train, y_train)
        accuracy = model.evaluate(x_test, y_test, verbose=0)[1]
        print(f"accuracy on the {len(x_test)} test images: {accuracy:.4f}")
        model.save(os.path.join(new, "model.keras"))
        np.save(os.path.join(new, "images.npy"), x_test)
        for file in ("model.keras", "images.npy"):
            os.replace(os.path.join(new, file), os.path.join(args.folder, file))
        print(f"wrote model.keras and images.npy in {args.folder}", flush=True)


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"must be a whole number above 0, not {text!r}"
        )
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = lambda message: parser.exit(2, f"{ERROR} {message}\n")
    add = parser.add_argument
    add("--data", metavar="FILE", help="a file laid out like Keras' mnist.npz")
    add("--num-images", type=positive, help="train on this many only")
    add("--folder", default=FOLDER, help="where to write")
    args = parser.parse_args()
    if not os.path.isdir(args.folder):
        parser.error(f"--folder: {args.folder} is not a folder; make it first")
    try:
        run(args)
    except BrokenPipeError:  # as in `| head -1`
        os._exit(1)
    except (OSError, ValueError) as error:
        sys.exit(f"{ERROR} {error}")


if __name__ == "__main__":
    main()
