# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["numpy>=1.26,<3", "tensorflow>=2.18,<3"]
# ///
# SPDX-License-Identifier: MIT-0
"""Train the model that expensive_init.py loads; save it with the test images.

Writes model.keras and images.npy (uint8, (10000, 28, 28)) into the current folder.
The images are MNIST's or, where MNIST cannot be had, synthetic ones.

Run `python save_model.py`. The same packages and images make the same model.
"""

import argparse
import os
import socket
import sys

import numpy as np


def import_tensorflow():
    """Import TensorFlow, on the CPU and with Keras as expensive_init.py uses it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a GPU would give another model
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["TF_USE_LEGACY_KERAS"] = "0"
    import tensorflow as tf

    return tf


def make_synthetic_images():
    """Return training and test data shaped like MNIST's: ten patterns in heavy noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 48, (10, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 70000)
    images = rng.integers(0, 208, (70000, 28, 28), dtype=np.uint8) + patterns[labels]
    return (images[:60000], labels[:60000]), (images[60000:], labels[60000:])


def load_images(mnist, synthetic):
    """Return what the images are, training data and test data: (images, labels) each."""
    if not synthetic:
        socket.setdefaulttimeout(10)  # seconds; some networks never answer
        try:
            return "MNIST", *mnist.load_data()
        except Exception as error:  # noqa: BLE001 (Keras raises just that)
            print(f"MNIST cannot be had, so synthetic images: {error}", file=sys.stderr)
    return "synthetic", *make_synthetic_images()


def train(tf, images, labels):
    """Return a model trained for one epoch on uint8 images (N, 28, 28), labels 0 to 9."""
    tf.keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    layers = tf.keras.layers
    model = tf.keras.Sequential()
    model.add(tf.keras.Input((28, 28)))
    model.add(layers.Rescaling(1 / 255))
    model.add(layers.Flatten())
    model.add(layers.Dense(512, activation="relu"))
    model.add(layers.Dropout(0.2))
    model.add(layers.Dense(10, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(images, labels, verbose=2)
    return model


def main():
    parser = argparse.ArgumentParser(description="Train the model, save it with images")
    parser.add_argument("--synthetic", action="store_true", help="do not ask for MNIST")
    args = parser.parse_args()
    tf = import_tensorflow()
    kind, training, test = load_images(tf.keras.datasets.mnist, args.synthetic)
    model = train(tf, *training)
    _, accuracy = model.evaluate(*test, verbose=0)
    model.save("model.keras")
    test_images, _ = test
    np.save("images.npy", test_images)
    print(f"wrote model.keras and images.npy: {kind} images, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
