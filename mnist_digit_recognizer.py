#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "matplotlib>=3.8", "tensorflow>=2.17", "scipy>=1.11,<2", "pillow>=10.1"]
# ///
"""Train a network that reads handwritten digits, measure it, and read your own pictures with it.

99.68% of MNIST's test images (mean of five seeds), where Keras' official example gets 99.18%.

    python mnist_digit_recognizer.py                             # train on MNIST, results in outputs/
    python mnist_digit_recognizer.py --predict my_digits/        # then: which digits are these?
    python mnist_digit_recognizer.py --read letter.jpg           # and which numbers are in this picture?

The core comes first: what the default run does, in the order in which data flows through it.
    Configuration   flags -> settings, checked before anything slow is loaded
    Data            a source -> training and test images with their labels
    Preprocessing   images -> the numbers that the network takes; the validation split
    Augmentation    a batch -> a batch of new images made out of old ones
    Model           a name -> a network
    Training        a network and data -> a trained network and its history
    Evaluation      a network and labelled images -> accuracy, loss, calibration
    Plots           arrays -> PNG files

The parts that support it come second, because the core can be read without them.
    Drawn digits    strokes -> images of digits, where there is no data set, and of non-digits to train on
    Data files      .npz, CSV and IDX files and the download of MNIST -> checked arrays
    Pictures        your own image files -> 28 x 28 digits as MNIST would have made them -> what the network says
    Numbers         a picture of several digits -> lines of candidates for digits -> the numbers in it
    Results         the output folder: signals, lock, publishing, checkpoints, saved models, tables
    Reports         a measured model -> what its layers look at; a model for phones; a page for the next morning
    Main            the jobs; it joins all parts, so it comes after them
    Appendix        the stroke tables, which need not be read
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import faulthandler
import gzip
import hashlib
import html
import importlib
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports shows no traceback

import numpy as np


class LazyModule(types.ModuleType):
    """A module that is imported when something in it is first asked for: --help and a wrong flag answer at once."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)


os.environ["KERAS_BACKEND"] = "tensorflow"  # also where keras.json names another
if platform.machine() in ("x86_64", "AMD64"):  # a third faster without AVX-512, where TensorFlow's default is 0
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
libraries = "keras scipy tensorflow matplotlib matplotlib.figure matplotlib.backends.backend_agg".split()
libraries += "PIL.Image PIL.ImageOps fcntl resource".split()
keras, scipy, tf, matplotlib, mpl_figure, mpl_agg, Image, ImageOps, fcntl, resource = map(LazyModule, libraries)

VERSION = "1.8.1"
UTC = "%Y-%m-%dT%H:%M:%S+00:00"  # ISO 8601, for time.strftime
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_BELOW_MINIMUM = 0, 1, 2, 3


class Failure(Exception):
    """The run cannot go on, and its user can do something about it: one line says what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: flags -> settings. Every check that needs no data is made here, before TensorFlow loads.
Config = argparse.Namespace  # the flags of a run, as `build_parser` lists them, and its job
Log = Callable[[str], None]  # takes a line for the user
SOURCES = "mnist; synthetic; an .npz file with x_train, y_train, x_test, y_test; a .csv file of labels and pixels; "
SOURCES += "a folder with train.csv or the four IDX files"
RANGES = "rotation shift zoom shear elastic flip".split()
# The flags that decide which weights a run ends with; a run may be resumed only with the same ones.
WEIGHT_FLAGS = RANGES + "augment train_limit validation_split model epochs batch_size learning_rate".split()
WEIGHT_FLAGS += "label_smoothing dropout patience seed members".split()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of after thirty lines of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message}; see --help\n")


def number(kind: type, low: float, high: float = 1e38) -> Callable[[str], Any]:
    """A converter for argparse: a number of that kind from `low` to `high`."""

    def convert(text: str) -> Any:
        if not low <= kind(text) <= high:  # NaN is not
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {low:g} to {high:.10g}")
        return kind(text)

    convert.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it: "invalid number value: 'x'"
    return convert


def build_parser() -> argparse.ArgumentParser:
    """All flags, with their defaults and why these are what they are."""
    codes = "exit codes: 0 done, 1 failed, 2 wrong usage, 3 below --min-accuracy, 130 and 143 stopped by a signal"
    # No abbreviations: a script that says --epoch today must not break when --epoch-size comes.
    parser = Parser(description=__doc__.partition("\n")[0], epilog=codes, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")

    def add(flag: str, text: str, **options: Any) -> None:
        default = options.get("default")
        group.add_argument(flag, help=text if default is None else f"{text} (default: {default})", **options)

    group = parser.add_argument_group("data")
    add("--data", f"auto: mnist, or synthetic where that is unavailable; {SOURCES}", default="auto", metavar="SOURCE")
    add("--train-limit", "use only the first N training images (default: all)", type=number(int, 2), metavar="N")
    add("--validation-split", "held out for validation", type=number(float, 1e-5, 0.99999), default=0.1, metavar="F")

    group = parser.add_argument_group("augmentation (each range is the largest change in either direction)")
    how = "keras: the affine maps alone, by ImageDataGenerator (default: fast; none for the mlp)"
    add("--augment", how, choices=["fast", "keras", "none"])
    # Wider ranges make other digits of some: a 7 turned far enough is a 1. Bent strokes take more epochs to learn.
    add("--rotation", "degrees", type=number(float, 0, 180), default=10.0, metavar="DEG")
    add("--shift", "of the width", type=number(float, 0, 0.5), default=0.08, metavar="FRAC")
    add("--zoom", "of the size", type=number(float, 0, 0.9), default=0.1, metavar="FRAC")
    add("--shear", "of the height", type=number(float, 0, 1), default=0.1, metavar="FRAC")
    add("--elastic", "bend the strokes by about PX pixels", type=number(float, 0, 10), default=0.0, metavar="PX")
    add("--flip", "mirror half of the images; leave it off for digits: a mirrored 2 is no 2", action="store_true")

    group = parser.add_argument_group("model and training")
    add("--model", "mlp: a 784-10-10-10-10 network", choices=["cnn", "mlp"], default="cnn")
    add("--epochs", "passes over the data", type=number(int, 1, 100_000), default=5, metavar="N")
    add("--batch-size", "images a step (default: an 80th of all, 32 to 256)", type=number(int, 1, 10**6), metavar="N")
    add("--learning-rate", "at the schedule's peak", type=number(float, 1e-12), default=5e-3, metavar="RATE")
    add("--label-smoothing", "share spread over all digits", type=number(float, 0, 0.9), default=0.1, metavar="F")
    # Augmentation leaves little to overfit, so dropout costs more than it brings.
    add("--dropout", "before the last layer", type=number(float, 0, 0.95), default=0.0, metavar="F")
    add("--patience", "stop after N epochs without progress; 0: never", type=number(int, 0), default=0, metavar="N")
    add("--seed", "seed of all random numbers", type=number(int, 0, 2**31 - 1), default=0, metavar="N")
    add("--resume", "continue a run that was stopped, after its last finished epoch", action="store_true")
    add("--members", "train an ensemble of N networks", type=number(int, 1, 1000), default=1, metavar="N")
    add("--strategy", "mirrored: on several GPUs", choices=["auto", "none", "mirrored"], default="auto")

    group = parser.add_argument_group("results")
    add("--output-dir", "where results go", type=Path, default=Path("outputs"), metavar="DIR")
    add("--no-plots", "write no PNG files", dest="plots", action="store_false")
    add("--tflite", "also write model.tflite, of 8-bit integers, for a phone", action="store_true")
    add("--min-accuracy", "exit 3 below this test accuracy (default: none)", type=number(float, 0, 1), metavar="F")
    add("--quiet", "print only the last line of the summary, predictions, warnings and errors", action="store_true")

    group = parser.add_argument_group("using a model, without training")
    add("--model-file", "a saved model (default: model.keras in the output folder)", type=Path, metavar="FILE")
    group = group.add_mutually_exclusive_group()
    add("--combine", "join the models of earlier runs in these folders", type=Path, nargs="+", metavar="DIR")
    add("--evaluate", "measure --model-file on the test images of --data", action="store_true")
    add("--predict", "recognise image files, all in a folder, or a .csv file", type=Path, nargs="+", metavar="PATH")
    add("--read", "read all the numbers in image files, or in all of a folder", type=Path, nargs="+", metavar="PATH")
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """Flags -> Config. Exits with code 2 where they are wrong; warns of augmentation flags without effect."""
    parser = build_parser()
    config = parser.parse_args(arguments)
    config.job = next((job for job in ("combine", "evaluate", "predict", "read") if getattr(config, job)), "train")
    if config.model_file and config.job in ("train", "combine"):
        parser.error("--model-file goes with --evaluate, --predict or --read; a training run always makes a new model")
    if config.combine and (len(config.combine) < 2 or config.output_dir.resolve() in map(Path.resolve, config.combine)):
        parser.error("--combine needs two or more folders, and an --output-dir that is none of them")
    if config.resume and config.job != "train":
        parser.error("--resume goes with a training run only")
    if config.job in ("predict", "read") and (config.tflite or config.min_accuracy is not None):
        parser.error(f"--min-accuracy and --tflite do not go with --{config.job}, where the true digits are unknown")
    if any(path.name.lower().endswith(CSV_ENDINGS) and not os.path.isdir(path) for path in config.predict or ()):
        config.job = "submit"
        if len(config.predict) > 1:
            parser.error("--predict takes pictures and folders, or one .csv file")
    config.augment = config.augment or {"cnn": "fast", "mlp": "none"}[config.model]
    config.model_file = config.model_file or config.output_dir / "model.keras"
    unused = {"fast": [], "keras": ["elastic"], "none": RANGES}[config.augment]
    given = [f"--{name}" for name in unused if getattr(config, name) != parser.get_default(name)]
    if given and config.job == "train":
        warn(f"WARNING: under --augment {config.augment} these change nothing: {', '.join(given)}")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Data: a source -> Digits
MNIST_SHA256 = "25c98f992c005963b7428e1f38418b233c9b286cc403519287eb8063f0bcfe07"  # of its arrays
DRAWN_TRAINING, DRAWN_TEST = 60_000, 10_000  # images of the synthetic data set, as many as MNIST has


class Digits(NamedTuple):
    """A data set: images uint8 (n, 28, 28), light ink on black; labels uint8 (n,), 0 to 9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    name: str
    origin: str
    sha256: str  # of the four arrays, the same whatever file they came from

    @property
    def title(self) -> str:
        return {"mnist": "MNIST", "synthetic": "SYNTHETIC digits (not MNIST)"}.get(self.name, f'"{self.name}"')


def load_digits(source: str) -> Digits:
    """Load the data set that `--data` names. Raises Failure, with the file and the fault, where that is impossible."""
    if source in ("auto", "mnist"):
        try:
            return load_mnist()
        except Failure as failure:
            if source == "mnist":
                raise
            warn(f"WARNING: {failure}; this run uses SYNTHETIC digits, and its figures are NOT those of MNIST")
    if source in ("auto", "synthetic"):
        # One seed for all runs: like MNIST, the data set stays the same while --seed varies the training.
        images, labels = synthetic_digits(DRAWN_TRAINING + DRAWN_TEST, seed=0)
        arrays = images[:DRAWN_TRAINING], labels[:DRAWN_TRAINING], images[DRAWN_TRAINING:], labels[DRAWN_TRAINING:]
        return name_digits(arrays, "strokes drawn by this program", "synthetic")
    stem = Path(os.path.abspath(source).removesuffix(".gz")).stem
    name = printable(f"own-{stem}" if stem in ("mnist", "synthetic") else stem)
    if tables := find_csv(Path(source)):
        return name_digits(*read_csv_digits(*tables), name)
    arrays = read_idx_folder(Path(source)) if os.path.isdir(source) else read_npz(Path(source))
    return name_digits(arrays, source, name)


def load_mnist() -> Digits:
    """MNIST from Keras' cache, compressed or not, or downloaded into it. Raises Failure if neither works."""
    cache = Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")) / "datasets" / "mnist.npz"
    with contextlib.suppress(Failure):  # a missing or damaged copy is downloaded
        digits = name_digits(read_npz(cache), str(cache), "")
        if digits.name == "mnist":
            return digits
    return name_digits(download_mnist(cache), "keras.datasets.mnist", "keras-mnist")


def name_digits(arrays: Sequence[np.ndarray], origin: str, name: str) -> Digits:
    """A data set of these four arrays. If they are those of MNIST, bit for bit, it is called mnist, whatever `name`."""
    content = b"".join(str(array.shape).encode() + array.tobytes() for array in arrays)
    sha256 = hashlib.sha256(content).hexdigest()
    return Digits(*arrays, "mnist" if sha256 == MNIST_SHA256 else name, origin, sha256)


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing: uint8 (n, 28, 28) -> float32 (n, 28, 28, 1) in [0, 1]


class Split(NamedTuple):
    """Images and labels to train on and, held out, to validate on: uint8 (n, 28, 28), (n,), (m, 28, 28), (m,)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 (n, 28, 28), 0 to 255 -> float32 (n, 28, 28, 1), 0 to 1: the form in which the network takes images."""
    return images[..., np.newaxis].astype(np.float32) / 255


def split_validation(digits: Digits, validation_split: float, train_limit: int | None) -> Split:
    """Hold out the last `validation_split` of the first `train_limit` images. Raises Failure if a part is empty."""
    images, labels = digits.train_images[:train_limit], digits.train_labels[:train_limit]
    held_out = round(len(images) * validation_split)
    if not 0 < held_out < len(images):
        raise Failure(f"--validation-split {validation_split:g} of {len(images)} images leaves one part empty")
    return Split(images[:-held_out], labels[:-held_out], images[-held_out:], labels[-held_out:])


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: a batch -> a batch, new images out of old ones
# Random numbers are a function of (seed, step) alone, so that a run on a CPU can be repeated, or resumed, exactly.
NUMPY_RANDOM = threading.Lock()  # NumPy's one global generator, which ImageDataGenerator seeds and draws from


def augmentation(config: Config) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """What `--augment` names, as a function (images float32 (n, 28, 28, 1), seed int32 (2,)) -> images."""
    if config.augment == "keras":
        return augment_keras(config)
    return lambda images, seed: images if config.augment == "none" else augment_fast(config, images, seed)


def augment_fast(config: Config, images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Move, bend and relight float32 (n, 28, 28, 1) images, which are in random order; `seed` is int32 (2,)."""
    seeds = tf.random.split(seed, 3)
    images = move(config, images, seeds[0])
    if config.elastic:
        images = distort(images, config.elastic, seeds[1])
    return vary_light(images, seeds[2])


def move(config: Config, images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Turn, shear, zoom, shift and mirror each image by a random affine map of its own, all in one operation."""
    limits = math.radians(config.rotation), config.shear, config.zoom, config.zoom, config.shift * 28, config.shift * 28
    *draws, mirror = tf.unstack(tf.random.stateless_uniform([7, tf.shape(images)[0]], seed, -1, 1))
    angle, shear, zoom_x, zoom_y, shift_x, shift_y = [draw * limit for draw, limit in zip(draws, limits, strict=True)]
    zoom_x, zoom_y = tf.exp(zoom_x), tf.exp(zoom_y)
    if config.flip:
        zoom_x *= tf.where(mirror < 0, -1.0, 1.0)
    # Row by row the matrix rotation x shear x zoom, which takes places in the new image to places in the old one, and
    # the offset that keeps the centre, (13.5, 13.5), where it is before the shift.
    cos, sin, zero = tf.cos(angle), tf.sin(angle), tf.zeros_like(angle)
    xx, xy = cos * zoom_x, (shear * cos - sin) * zoom_y
    yx, yy = sin * zoom_x, (shear * sin + cos) * zoom_y
    offset_x = 13.5 - (xx + xy) * 13.5 + shift_x
    offset_y = 13.5 - (yx + yy) * 13.5 + shift_y
    return keras.ops.image.affine_transform(images, tf.stack([xx, xy, offset_x, yx, yy, offset_y, zero, zero], axis=1))


def vary_light(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Change focus, contrast, ground, shadow, sign or noise of half of the images, float32 (n, 28, 28, 1)."""
    # A network that has only seen light ink on pure black takes any other ground for ink. The other half stays as it
    # is, so that clean images are learnt no worse. A batch is in random order, so a slice of it is a random part.
    clean, images = images[: tf.shape(images)[0] // 2], images[tf.shape(images)[0] // 2 :]
    count = tf.shape(images)[0]
    seeds = tf.random.split(seed, 2)
    draws = iter(tf.unstack(tf.random.stateless_uniform([8, count, 1, 1, 1], seeds[0])))

    def sometimes(share: float, low: float, high: float, otherwise: float) -> tf.Tensor:
        """For a `share` of the images a number between `low` and `high`: one draw says whether, and then how much."""
        draw = next(draws)
        return tf.where(draw < share, low + (high - low) * draw / share, otherwise)

    sharp_from, noisy_from = count * 30 // 100, count * 50 // 100
    binomial = tf.constant([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = tf.tensordot(binomial, binomial, axes=0)[:, :, tf.newaxis, tf.newaxis]
    blurred = tf.nn.conv2d(images[:sharp_from], kernel, 1, "SAME")
    images = tf.concat([blurred, images[sharp_from:]], axis=0)
    across = tf.reshape(tf.linspace(-1.0, 1.0, 28), [1, 1, 28, 1])
    angle, offset, steepness = 2 * math.pi * next(draws), 2 * next(draws) - 1, tf.exp(4 * next(draws))
    distance = tf.cos(angle) * across + tf.sin(angle) * tf.reshape(across, [1, 28, 1, 1]) - offset
    shadow = sometimes(0.4, 0.0, 0.6, 0.0) * tf.sigmoid(steepness * distance)
    ground = tf.maximum(sometimes(0.5, 0.0, 0.6, 0.0), shadow)
    images = ground + (1 - ground) * sometimes(0.5, 0.5, 1.0, 1.0) * images
    images = tf.abs(sometimes(0.2, 1.0, 1.0, 0.0) - images)
    noise = tf.random.stateless_normal([count - noisy_from, 28, 28, 1], seeds[1]) * 0.25 * next(draws)[noisy_from:]
    images = tf.concat([images[:noisy_from], images[noisy_from:] + noise], axis=0)
    return tf.concat([clean, tf.clip_by_value(images, 0.0, 1.0)], axis=0)


def distort(images: tf.Tensor, pixels: float, seed: tf.Tensor) -> tf.Tensor:
    """Displace each pixel by a smooth random field, by about so many pixels (after Simard et al., ICDAR 2003)."""
    count = tf.shape(images)[0]
    field = tf.random.stateless_normal([count, 7, 7, 2], seed) * pixels  # a coarse grid, enlarged below
    down, right = tf.unstack(tf.image.resize(field, [28, 28], method="bicubic"), axis=-1)
    image, row, column = tf.meshgrid(*(tf.range(n, dtype=tf.float32) for n in (count, 28, 28)), indexing="ij")
    places = tf.stack([image, row + down, column + right])
    return keras.ops.image.map_coordinates(images[..., 0], places, order=1, fill_mode="nearest")[..., tf.newaxis]


def augment_keras(config: Config) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The same affine ranges through Keras' `ImageDataGenerator`, an image at a time, as (images, seed) -> images."""
    flags = {"rotation_range": config.rotation, "width_shift_range": config.shift, "height_shift_range": config.shift}
    flags |= {"shear_range": math.degrees(math.atan(config.shear)), "zoom_range": config.zoom, "fill_mode": "constant"}
    generator = tf.keras.preprocessing.image.ImageDataGenerator(**flags, horizontal_flip=config.flip)

    def transform(images: np.ndarray, seed: np.ndarray) -> np.ndarray:
        seeds = np.random.default_rng(seed.view(np.uint32)).integers(2**32, size=len(images))
        with NUMPY_RANDOM:
            return np.stack([generator.random_transform(*pair) for pair in zip(images, seeds, strict=True)])

    return lambda images, seed: tf.ensure_shape(tf.numpy_function(transform, [images, seed], tf.float32), images.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Model: a name -> an uncompiled keras.Model


def build_model(name: str, dropout: float, seed: int) -> keras.Model:
    """A network from images, float32 (n, 28, 28, 1) in [0, 1], to probabilities, float32 (n, 10)."""
    keras.utils.set_random_seed(seed)  # of the first weights and of dropout
    layers, body = keras.layers, []
    if name == "mlp":
        body += [layers.Flatten(), *(layers.Dense(10, activation="relu") for _ in range(3))]
    else:
        # The arrays of the first block are the largest: with ReLU, not normalised, a step takes a tenth less time.
        body += [layers.Conv2D(32, 5), layers.MaxPooling2D(2), layers.Activation("relu")]  # 28 x 28 -> 12 x 12
        for filters, pooling in ((64, True), (160, False)):  # -> 5 x 5 -> 3 x 3
            body += [layers.Conv2D(filters, 3, use_bias=False)]
            # Pooling comes before normalisation, which then has a quarter of the work; no accuracy is lost.
            body += [layers.MaxPooling2D(2)] if pooling else []
            # SiLU (Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", 2018) ends at a lower loss than ReLU.
            body += [layers.BatchNormalization(momentum=0.9), layers.Activation("silu")]
        body += [layers.Flatten(), layers.Dense(128, use_bias=False)]
        body += [layers.BatchNormalization(momentum=0.9), layers.Activation("silu")]
    body += [layers.Dropout(dropout)] if dropout else []
    body += [layers.Dense(10, name="logits"), layers.Softmax()]
    return keras.Sequential([keras.Input((28, 28, 1)), *body], name=name)


def add_test_time_augmentation(model: keras.Model) -> keras.Model:
    """A model that averages the logits of the image moved by a pixel up and left, and down and right."""
    # Two moves bring what nine do, the image as it is among them. Training does without: it moves images anyway.
    inputs, one_look = keras.Input((28, 28, 1)), keras.Model(model.inputs, model.layers[-1].input, name="one_look")
    padded = keras.layers.ZeroPadding2D(1)(inputs)
    logits = [one_look(keras.layers.Cropping2D((margins, margins))(padded)) for margins in ((0, 2), (2, 0))]
    return keras.Model(inputs, keras.layers.Softmax()(keras.layers.Average()(logits)), name=model.name)


def networks_of(model: keras.Model) -> list[keras.Model]:
    """The networks that are joined in a model: each has a layer of its own for the logits."""
    if any(layer.name == "logits" for layer in model.layers):
        return [model]
    return [network for layer in model.layers if isinstance(layer, keras.Model) for network in networks_of(layer)]


def build_ensemble(members: Sequence[keras.Model]) -> keras.Model:
    """The mean of the members' logits, through one softmax: the normalised geometric mean of their probabilities."""
    inputs = keras.Input((28, 28, 1))
    logits = [keras.Model(m.inputs, m.layers[-1].input, name=f"member_{n}")(inputs) for n, m in enumerate(members, 1)]
    return keras.Model(inputs, keras.layers.Softmax()(keras.layers.Average()(logits)), name="ensemble")


# ---------------------------------------------------------------------------------------------------------------------
# Training: model + data -> history
NON_DIGIT_SHARE, DRAWN_SHARE = 0.12, 0.04  # added to the training images, as shares of them
IMAGES_PER_EXECUTION = 2048  # in one call of TensorFlow: more cost less overhead, fewer see a signal sooner
Row = dict[str, float]  # of history.csv: one epoch


def count_steps(images: int, batch_size: int | None) -> tuple[int, int, int]:
    """Batch size, steps per epoch, and steps per execution, of which an epoch has a whole number."""
    # Large batches take less time an image; of few images, small ones make more steps, in which more is learnt.
    batch_size = min(batch_size or min(max(images // 80, 32), 256), images)
    steps_per_epoch = images // batch_size
    most = max(IMAGES_PER_EXECUTION // batch_size, 1)
    return batch_size, steps_per_epoch, next(n for n in range(most, 0, -1) if steps_per_epoch % n == 0)


def training_set(split: Split, dataset: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training images, images of non-digits and drawn digits: uint8 (m, 28, 28), with targets float32 (m, 10)."""
    # Non-digits have uniform targets; half are drawn, half made of the digits (Hendrycks, Mazeika, Dietterich, "Deep
    # anomaly detection with outlier exposure", ICLR 2019). The drawn digits, in ways that are rare in MNIST, help with
    # other people's pictures; other data sets get none of them.
    rng = np.random.default_rng(seed)
    count = round(NON_DIGIT_SHARE * len(split.x_train))
    non_digits = draw_non_digits(count - count // 2, rng)
    corrupted = corrupt_digits(split.x_train, split.y_train, count // 2, rng)
    drawn, labels = synthetic_digits(round(DRAWN_SHARE * len(split.x_train)) if dataset == "mnist" else 0, seed)
    one_hot = np.eye(10, dtype=np.float32)[np.concatenate([split.y_train, labels])]
    targets = np.concatenate([one_hot, np.full((count, 10), 0.1, np.float32)])
    return np.concatenate([split.x_train, drawn, non_digits, corrupted]), targets


def training_batches(images: tf.Tensor, targets: tf.Tensor, config: Config, seed: int, start: int) -> tf.data.Dataset:
    """Batches of augmented images and their targets, from the epoch `start` to the last, each epoch in a new order."""
    # Whole batches are gathered by index from one tensor, which is several times faster than image by image.
    batch_size, steps_per_epoch, steps_per_execution = count_steps(len(images), config.batch_size)
    augment = augmentation(config)

    def indices_of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(tf.range(len(images)), seed=[seed, epoch])
        order = tf.reshape(order[: steps_per_epoch * batch_size], [steps_per_epoch, batch_size])
        return tf.data.Dataset.from_tensor_slices((epoch * steps_per_epoch + tf.range(steps_per_epoch), order))

    @tf.autograph.experimental.do_not_convert  # takes seconds; no branch here depends on a tensor
    def batch_of_indices(step: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch = tf.cast(tf.gather(images, indices), tf.float32)[..., tf.newaxis] / 255
        return augment(batch, tf.stack([seed, step])), tf.gather(targets, indices)

    options = tf.data.Options()
    options.autotune.enabled = False  # it finds nothing better here, and takes seconds to shut down
    epochs = tf.data.Dataset.from_tensor_slices(tf.range(start, config.epochs))
    batches = epochs.flat_map(indices_of_epoch).map(batch_of_indices, os.cpu_count(), deterministic=True)
    return batches.prefetch(steps_per_execution).with_options(options)


def make_optimizer(schedule: keras.optimizers.schedules.LearningRateSchedule) -> keras.optimizers.Optimizer:
    """Muon (K. Jordan et al., "Muon: an optimizer for hidden layers", 2024); Adam for vectors and layers of 10."""

    class Muon(keras.optimizers.Adam):  # keras.optimizers.Muon leaves convolutions to Adam, in some versions
        def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
            """Take a step that is, as a matrix of inputs x outputs, nearly orthogonal: no direction dominates."""
            if len(variable.shape) < 2 or variable.shape[-1] == 10:
                return super().update_step(gradient, variable, learning_rate)
            momentum = self._momentums[self._get_variable_index(variable)]
            self.assign(momentum, 0.95 * momentum + gradient)
            step = tf.reshape(0.95 * momentum + gradient, [-1, variable.shape[-1]])
            step /= tf.norm(step) + 1e-7
            # Newton-Schulz, on the small Gram matrix: Jordan's coefficients bring the larger singular values near 1.
            gram, product = tf.matmul(step, step, transpose_a=True), tf.eye(step.shape[1])
            for _ in range(3):
                factor = 3.4445 * tf.eye(step.shape[1]) - 4.775 * gram + 2.0315 * gram @ gram
                gram, product = factor @ gram @ factor, product @ factor
            size = 0.2 * max(step.shape) ** 0.5  # that of Adam's steps (Liu et al., "Muon is scalable", 2025)
            return self.assign_sub(variable, learning_rate * size * tf.reshape(step @ product, variable.shape))

    return Muon(schedule, beta_2=0.99)  # a shorter memory than the usual 0.999, for a run of a few thousand steps


def compile_model(model: keras.Model, config: Config, steps_per_epoch: int, steps_per_execution: int) -> None:
    """Muon with a one-cycle learning rate (Smith, Topin, "Super-convergence", 2018): up, then a cosine down."""
    # Label smoothing (Szegedy et al., "Rethinking the Inception architecture", 2016) is the largest single gain.

    def accuracy(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """Of the digits alone: a uniform target has no right answer."""
        return tf.boolean_mask(keras.metrics.categorical_accuracy(y_true, y_pred), tf.reduce_max(y_true, -1) > 0.5)

    peak, total = config.learning_rate, config.epochs * steps_per_epoch
    warmup = total // 5
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=peak / 10, warmup_target=peak, warmup_steps=warmup, decay_steps=total - warmup, alpha=0.01
    )
    model.compile(
        optimizer=make_optimizer(schedule),
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
        # A metric, not a function: its variable is there before the steps are traced, else they are traced twice.
        metrics=[keras.metrics.MeanMetricWrapper(accuracy, "accuracy")],
        # Several steps in one call fail now and then where several devices share them.
        steps_per_execution=steps_per_execution if tf.distribute.get_strategy().num_replicas_in_sync == 1 else 1,
    )


def train_model(
    model: keras.Model, split: Split, dataset: str, config: Config, seed: int, checkpoint: Path, log: Log
) -> list[Row]:
    """Fit an uncompiled model in place; return the rows of history.csv. Raises Failure if the loss is not finite."""
    # The state is kept in the file `checkpoint` after each epoch; where it exists, training goes on from there.
    images, targets = map(tf.constant, training_set(split, dataset, seed))
    batch_size, steps_per_epoch, steps_per_execution = count_steps(len(images), config.batch_size)
    log(f"{model.name} with {model.count_params():,} parameters, seed {seed}, {batch_size} images a step")
    compile_model(model, config, steps_per_epoch, steps_per_execution)
    history, best_weights = load_checkpoint(checkpoint, model)
    progress_bar = sys.stdout.isatty() and not config.quiet
    ends = [time.perf_counter()]

    def finish_epoch(epoch: int, logs: Row) -> None:
        ends.append(time.perf_counter())
        row = {"seed": seed, "epoch": epoch + 1, **logs, "learning_rate": float(model.optimizer.learning_rate)}
        history.append(row | {"seconds": round(ends[-1] - ends[-2], 3), "images": steps_per_epoch * batch_size})
        if not progress_bar:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in logs.items())
            log(f"epoch {epoch + 1}/{config.epochs}  {figures}  {ends[-1] - ends[-2]:.1f} s")
        if not math.isfinite(logs["loss"] + logs["val_loss"]):
            raise Failure("the loss is NaN or infinite, so nothing was saved; try a smaller --learning-rate")
        if config.patience and best_epoch(history) == epoch + 1:
            best_weights[:] = model.get_weights()
        save_checkpoint(checkpoint, model, history, best_weights)
        model.stop_training = is_finished(history, config)

    if not is_finished(history, config):
        one_hot = np.eye(10, dtype=np.float32)[split.y_validation]
        model.fit(
            training_batches(images, targets, config, seed, start=len(history)),
            initial_epoch=len(history),
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch,
            validation_data=tf.data.Dataset.from_tensor_slices((normalise(split.x_validation), one_hot)).batch(500),
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=finish_epoch)],
            verbose=int(progress_bar),
        )
    if config.patience:
        model.set_weights(best_weights)
    return history


def best_epoch(history: list[Row]) -> int:
    """The epoch with the smallest validation loss, counted from 1."""
    return int(min(history, key=lambda row: row["val_loss"])["epoch"])


def is_finished(history: list[Row], config: Config) -> bool:
    """Whether all epochs are done, or the run is out of patience, also in epochs before it was resumed."""
    waited = len(history) - best_epoch(history) if history else 0
    return len(history) == config.epochs or waited >= config.patience > 0


def strategy_scope(name: str) -> contextlib.AbstractContextManager:
    """The scope in which a model is built and trained: one device, or several that share each batch."""
    if name == "none" or (name == "auto" and len(tf.config.list_logical_devices("GPU")) < 2):
        return contextlib.nullcontext()
    return tf.distribute.MirroredStrategy().scope()  # on all GPUs; where there is none, on the CPU


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: model + images + labels -> an Evaluation, in plain NumPy; calibration
CALIBRATION_BINS = 15


class Evaluation(NamedTuple):
    """What a model says of n labelled images; its properties are (n,) arrays."""

    labels: np.ndarray  # uint8 (n,)
    probabilities: np.ndarray  # float64 (n, 10), rows sum to 1

    @property
    def predictions(self) -> np.ndarray:
        return self.probabilities.argmax(axis=1)

    @property
    def confidences(self) -> np.ndarray:
        return self.probabilities.max(axis=1)

    @property
    def correct(self) -> np.ndarray:
        return self.predictions == self.labels


def predict_probabilities(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """uint8 (n, 28, 28) -> float64 (n, 10), rows sum to 1. Raises Failure where the output is not probabilities."""
    parts = np.split(images, range(100, len(images), 100))  # bounds the memory
    probabilities = np.concatenate([model.predict_on_batch(normalise(part)) for part in parts]).astype(np.float64)
    if not (probabilities.min() >= 0 and np.allclose(probabilities.sum(axis=1), 1, atol=1e-3)):  # false for NaN too
        raise Failure("the model's output is not probabilities (ten numbers from 0 to 1 that sum to 1); train it again")
    return probabilities


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """The logarithms, which serve as logits: they differ by a constant in each row, which softmax ignores."""
    return np.log(np.maximum(probabilities, 1e-30))  # where float32 has rounded to 0


def cross_entropy(evaluation: Evaluation) -> float:
    """Mean of -ln(probability of the label), in nats."""
    of_label = evaluation.probabilities[np.arange(len(evaluation.labels)), evaluation.labels]
    return -float(log_probabilities(of_label).mean())


def confusion_matrix(evaluation: Evaluation) -> np.ndarray:
    """int64 (10, 10): rows are labels, columns predictions."""
    return np.bincount(10 * evaluation.labels + evaluation.predictions, minlength=100).reshape(10, 10)


def per_digit(matrix: np.ndarray) -> list[dict[str, float]]:
    """Precision, recall and F1 of each digit, from a confusion matrix; 0 where a ratio has nothing to count."""
    hits, labelled, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(labelled, 1)
    rows = zip(range(10), precision, recall, 2 * hits / np.maximum(labelled + predicted, 1), strict=True)
    return [dict(zip(("digit", "precision", "recall", "f1"), row, strict=True)) for row in rows]


def calibration_bins(evaluation: Evaluation) -> np.ndarray:
    """By bins of confidence, float64 (3, 15): how many images, their mean confidence, and the share that is right."""
    bins = np.minimum((evaluation.confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    weights = np.ones(len(bins)), evaluation.confidences, evaluation.correct
    counts, *sums = (np.bincount(bins, weight, CALIBRATION_BINS) for weight in weights)
    return np.stack([counts, *(total / np.maximum(counts, 1) for total in sums)])


def expected_calibration_error(evaluation: Evaluation) -> float:
    """Mean distance of confidence and accuracy by bins (Guo et al., "On calibration of modern neural networks")."""
    counts, confidence, accuracy = calibration_bins(evaluation)
    return float(counts @ np.abs(confidence - accuracy) / counts.sum())


def apply_temperature(evaluation: Evaluation, temperature: float) -> Evaluation:
    """The evaluation with probabilities softmax(logits / temperature)."""
    logits = log_probabilities(evaluation.probabilities)
    return evaluation._replace(probabilities=scipy.special.softmax(logits / temperature, axis=1))


def fit_temperature(evaluation: Evaluation) -> float:
    """The temperature from 1/20 to 20 for which the cross-entropy is smallest (Guo et al., ICML 2017)."""
    best = scipy.optimize.minimize_scalar(lambda t: cross_entropy(apply_temperature(evaluation, t)), bounds=(0.05, 20))
    return float(best.x)


def calibrate(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> tuple[float, Evaluation]:
    """Fit a temperature on held-out images, fold it into the weights, and return it with the calibrated evaluation."""
    raw = Evaluation(labels, predict_probabilities(model, images))
    temperature = fit_temperature(raw)
    for network in networks_of(model):
        logits = network.get_layer("logits")
        logits.set_weights([weights / temperature for weights in logits.get_weights()])
    return temperature, apply_temperature(raw, temperature)


# ---------------------------------------------------------------------------------------------------------------------
# Plots: plain arrays -> one PNG each. `path` is always the PNG to write.
INK, MUTED, BLUE, ORANGE, RED = "#1a1a1a", "#6b6b6b", "#1f6fb4", "#e07b1a", "#c0392b"
IN_CELL = {"ha": "center", "va": "center", "in_layout": False}  # the layout need not measure hundreds of texts


@contextlib.contextmanager
def new_figure(file: Path | io.BytesIO, width: float, height: float, title: str, subtitle: str) -> Iterator[Any]:
    """A matplotlib.figure.Figure, in inches, with a headline and a line below it; saved at the end, without display."""
    style = {"font.size": 11, "text.color": INK, "axes.titlesize": 12, "axes.titlelocation": "left"}
    with matplotlib.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = mpl_figure.Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
        figure.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 1 - 0.75 / height))
        figure.text(0.18 / width, 1 - 0.12 / height, title, fontsize=15, fontweight="bold", va="top", parse_math=False)
        figure.text(0.18 / width, 1 - 0.46 / height, subtitle, fontsize=10.5, color=MUTED, va="top")
        yield figure
        mpl_agg.FigureCanvasAgg(figure).print_png(file)  # savefig would do the layout twice


def show_image(axes: matplotlib.axes.Axes, image: np.ndarray, title: str = "", colours: Any = "gray") -> None:
    """Draw 0 to 255: (height, width) in grey, (height, width, 3) in colour, or a sheet of (rows, columns, 28, 28)."""
    if image.ndim == 4:  # with a black line around each image
        image = np.block([[*row] for row in np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))])
    axes.imshow(image, cmap=colours, vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="center", pad=3, parse_math=False)
    axes.set_axis_off()


def plot_samples(path: Path, images: np.ndarray, labels: np.ndarray, dataset: str) -> None:
    """Twelve images of each digit, a row a digit."""
    sheet = np.zeros((10, 12, 28, 28), np.uint8)
    title, subtitle = f"What the data looks like: {dataset}", "Each row: twelve training images of one digit."
    with new_figure(path, 9.2, 8.4, title, subtitle) as figure:
        axes = figure.subplots()
        for digit in range(10):
            found = images[labels == digit][:12]
            sheet[digit, : len(found)] = found
            axes.text(-12, 30 * digit + 15, str(digit), fontsize=13, ha="center", va="center")
        show_image(axes, sheet)


def plot_pixels(path: Path, image: np.ndarray, label: int) -> None:
    """What an image is to a computer: numbers; in grey one number a pixel, in colour three."""
    title = f"What a computer sees: an image of a {label} is 28 x 28 numbers"
    subtitle = "0 is black, 255 white; colour needs three numbers a pixel. The network takes grey, divided by 255."
    paper, pen = np.array([20, 40, 90]), np.array([255, 190, 60])
    colour = (paper + image[..., np.newaxis] / 255 * (pen - paper)).astype(np.uint8)
    with new_figure(path, 13, 8.6, title, subtitle) as figure:
        mosaic = [["numbers", "grey", "colour"], ["numbers", "red", "green"], ["numbers", "blue", "."]]
        axes = figure.subplot_mosaic(mosaic, width_ratios=[3, 0.75, 0.75])
        show_image(axes["numbers"], image)
        for (row, column), value in np.ndenumerate(image):
            shade = "black" if value > 140 else "#8f8f8f" if value == 0 else "white"
            axes["numbers"].text(column, row, str(value), fontsize=6.2, color=shade, **IN_CELL)
        show_image(axes["grey"], image, "grey: 28 x 28 x 1")
        show_image(axes["colour"], colour, "colour: 28 x 28 x 3")
        for channel, name in enumerate(("red", "green", "blue")):
            levels = colour * (np.arange(3) == channel)
            show_image(axes[name], levels, f"{name} channel, {colour[..., channel].min()} to {levels.max()}")


def plot_augmentation(path: Path, originals: np.ndarray, variants: np.ndarray, how: str) -> None:
    """Originals uint8 (n, 28, 28) in the first column, and what augmentation makes of them, (n, m, 28, 28), beside."""
    count, versions = variants.shape[:2]
    subtitle = f"Left: the original. Right: {versions} versions of it to train on (--augment {how})."
    with new_figure(path, versions + 1.4, count + 1.0, "New training images out of old ones", subtitle) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1, versions])
        show_image(left, originals[:, np.newaxis], "original")
        show_image(right, variants, "augmented")


def plot_training_curves(path: Path, history: list[Row], dataset: str) -> None:
    """Loss, accuracy and learning rate over the epochs; a line for each seed."""
    by_seed = [list(rows) for _, rows in itertools.groupby(history, key=lambda row: row["seed"])]
    epochs = " + ".join(str(len(rows)) for rows in by_seed)
    title = f"Training on {dataset}: {epochs} epoch{'s' * (epochs != '1')}"
    subtitle = "Training: mean over the epoch, with augmentation and non-digits. Validation: at its end, clean digits."
    panels = {
        "loss (with label smoothing)": {"loss": ORANGE, "val_loss": BLUE},
        "accuracy": {"accuracy": ORANGE, "val_accuracy": BLUE},
        "learning rate at the end of the epoch": {"learning_rate": MUTED},
    }
    with new_figure(path, 12, 4.6, title, subtitle) as figure:
        for axes, (name, lines) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for (key, colour), rows in itertools.product(lines.items(), by_seed):
                axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], "o-", color=colour, markersize=4)
            axes.set(title=name, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.25)
            if len(lines) > 1:
                axes.legend(axes.lines[:: len(by_seed)], ["training", "validation"], frameon=False)


def plot_confusion_matrix(path: Path, evaluation: Evaluation, title: str) -> None:
    """Counts and, beside them, rates: which digit is taken for which."""
    matrix = confusion_matrix(evaluation)
    rates = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    subtitle = "Rows: the label. Columns: what the network said. Off the diagonal are errors: redder is more."
    with new_figure(path, 13.4, 6.6, title, subtitle) as figure:
        panels = ("images", matrix, "d"), ("% of the label's images", rates, ".2f")
        for axes, (name, values, form) in zip(figure.subplots(1, 2), panels, strict=True):
            errors = values * ~np.eye(10, dtype=bool)
            axes.imshow(errors, cmap="Reds", vmin=0, vmax=max(errors.max() * 1.6, 1e-9))
            for (row, column), value in np.ndenumerate(values):
                text, weight = format(value, form) if value else "", "bold" if row == column else "normal"
                axes.text(column, row, text, fontsize=9.5, fontweight=weight, **IN_CELL)
            axes.set(xticks=range(10), yticks=range(10), xlabel="prediction", ylabel="label", title=name)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)


def plot_calibration(path: Path, evaluation: Evaluation, title: str) -> None:
    """Confidence against how often it is right, and how many images have which confidence."""
    bins = calibration_bins(evaluation)
    counts, confidence, accuracy = bins[:, bins[0] > 0]
    spread = 1.96 * np.sqrt(np.maximum(accuracy * (1 - accuracy), 0.25 / (counts + 1)) / counts)
    bars = np.minimum(spread, [accuracy, 1 - accuracy])
    subtitle = "Of the images of which a calibrated network is 80% sure, 80% are right: its points lie on the diagonal."
    with new_figure(path, 11.5, 5.4, title, subtitle) as figure:
        reliability, histogram = figure.subplots(1, 2)
        reliability.plot([0, 1], [0, 1], "--", color=MUTED, label="perfectly calibrated")
        reliability.errorbar(confidence, accuracy, bars, fmt="o", color=BLUE, capsize=3, label="the network (95%)")
        error = f"expected calibration error {expected_calibration_error(evaluation):.4f}"
        reliability.set(ylabel="share that is right", ylim=(0, 1.05), title=error)
        for kind, colour, chosen in (("right", BLUE, evaluation.correct), ("wrong", RED, ~evaluation.correct)):
            style = {"color": colour, "alpha": 0.75, "label": f"{kind}: {chosen.sum():,}", "range": (0, 1)}
            histogram.hist(evaluation.confidences[chosen], CALIBRATION_BINS, **style)
        histogram.set_yscale("symlog", linthresh=1)
        histogram.set(ylabel="images (logarithmic)", title="how sure the network is")
        histogram.yaxis.set_major_formatter("{x:,.0f}")
        for axes, place in ((reliability, "lower right"), (histogram, "upper left")):
            axes.set(xlabel="confidence", xlim=(0, 1.02))
            axes.legend(frameon=False, loc=place)
            axes.grid(alpha=0.25)


# What a sheet shows of one image: a title, a verdict, whether it is good (else it is red), pictures, uint8 (height,
# width), ten probabilities as bars, and the digit whose bar is blue.
Card = tuple[str, str, bool, Sequence[np.ndarray], np.ndarray, int]
OWN_CARDS = "The picture, the 28 x 28 digit that the network saw, and how probable it finds each digit."


def plot_cards(path: Path, cards: Sequence[Card], title: str = "Your own pictures", subtitle: str = OWN_CARDS) -> None:
    """A sheet of cards, four a row. All share one pair of axes, which takes a tenth of the time of one a picture."""
    width, height = 1.08 * (len(cards[0][3]) if cards else 1) + 1.4, 1.62  # of a card, in inches
    across, down = min(max(len(cards), math.ceil(9.3 / width)), 4), max(math.ceil(len(cards) / 4), 1)
    with new_figure(path, width * across + 0.4, height * down + 1.0, title, subtitle) as figure:
        figure.set_layout_engine(None)
        axes = figure.add_axes((0.02, 0.0, 0.96, 1 - 0.85 / (height * down + 1.0)))
        for index, card in enumerate(cards):
            draw_card(axes, card, width * (index % 4), width * (index % 4 + 1) - 0.2, -height * (index // 4))
        axes.text(width, -0.5, "" if cards else "none", fontsize=14)
        axes.set(xlim=(0, width * across), ylim=(0.5 - height * down, 0.35))
        axes.set_aspect("equal", anchor="NW")
        axes.set_axis_off()


def draw_card(axes: matplotlib.axes.Axes, card: Card, left: float, right: float, top: float) -> None:
    """A title and the verdict; below them the pictures, each in a square of 1 x 1, and the bars."""
    title, verdict, good, pictures, probabilities, chosen = card
    axes.text(left, top + 0.08, title, fontsize=8.5, va="bottom", parse_math=False)
    axes.text(right, top + 0.08, verdict, color=INK if good else RED, weight="bold", size=9.5, ha="right", va="bottom")
    for index, picture in enumerate(pictures):
        middle, (tall, wide) = left + 1.08 * index + 0.5, np.array(picture.shape) / max(picture.shape) / 2
        box = middle - wide, middle + wide, top - 0.5 - tall, top - 0.5 + tall
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=box, interpolation="nearest")
    axes.plot([right - 1.16, right], [top - 0.9] * 2, color=MUTED, linewidth=0.6)
    places = right - 1.1 + 0.115 * np.arange(10)
    colours = [BLUE if digit == chosen else ORANGE for digit in range(10)]
    axes.vlines(places, top - 0.9, top - 0.9 + 0.88 * probabilities, colours, linewidth=7.2)
    style = {"family": "monospace", "fontsize": 6.88, "color": MUTED}  # in which two characters are 0.115 inches wide
    axes.text(places.mean(), top - 0.92, " ".join("0123456789"), ha="center", va="top", **style)


def cards_of(images: np.ndarray, evaluation: Evaluation, chosen: np.ndarray) -> list[Card]:
    """Cards of the chosen test images: the label, what the network says, and how probable it finds each digit."""
    rows = zip(images[chosen], evaluation.labels[chosen], evaluation.probabilities[chosen], strict=True)
    return [
        (f"label {label}", f"says {p.argmax()}, {p.max():.1%}", p.argmax() == label, [image], p, label)
        for image, label, p in rows
    ]


def plot_numbers(path: Path, pictures: Sequence[tuple[str, np.ndarray, list]]) -> None:
    """Pictures, three a row: a title, uint8 (height, width), and the numbers: text, corners, doubtful boxes."""
    down = max(math.ceil(len(pictures) / 3), 1)
    subtitle = "A box at each number, and above it how it was read. Red: a doubtful digit."
    with new_figure(path, 12, 3.2 * down + 1.0, "The numbers in your pictures", subtitle) as figure:
        for index, (name, image, marks) in enumerate(pictures, start=1):
            axes = figure.add_subplot(down, 3, index)
            show_image(axes, image, name)
            for text, ((left, top), (right, bottom)), doubtful in marks:
                size = np.clip(130 * (bottom - top) / max(image.shape), 5, 10)  # fits between lines
                ground = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5}  # the picture may be dark
                axes.text(left, top, text, size=size, fontweight="bold", color=BLUE, va="bottom", bbox=ground)
                for colour, (a, b, c, d) in [(BLUE, (left, top, right, bottom)), *((RED, box) for box in doubtful)]:
                    axes.plot([a, c, c, a, a], [b, b, d, d, b], color=colour, linewidth=1.2)


# ---------------------------------------------------------------------------------------------------------------------
# Drawn digits: strokes -> images of digits, for machines without a data set, and of non-digits
TURNABLE = (2, 3, 4, 5, 7)  # no digits any more after a quarter turn
SPLICES = (1, 10, 13, 15, 20, 40, 42, 51, 52, 54, 57, 59, 70)  # 42: the top of a 4 on the bottom of a 2 is no digit


def synthetic_digits(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw (n, 28, 28) uint8 images of digits, light on black, and their (n,) uint8 labels, all equally often."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    ways = [WAYS[digit] for digit in "0123456789"]
    counts = np.array([len(each) for each in ways])
    firsts = np.cumsum(counts) - counts  # where each digit's ways begin in the list of all ways
    choices = firsts[labels] + rng.integers(counts[labels])
    return draw_ways([*itertools.chain(*ways)], choices, rng), labels.astype(np.uint8)


def draw_ways(ways: Sequence[str], choices: np.ndarray, rng: np.random.Generator, turn: float = 0.12) -> np.ndarray:
    """Draw ways[choices[i]] for each of (n,) choices, turned by about `turn` radians: -> (n, 28, 28) uint8."""
    images = np.empty((len(choices), 28, 28), np.uint8)
    for index in np.unique(choices):
        rows = np.flatnonzero(choices == index)
        for chunk in np.split(rows, range(1000, len(rows), 1000)):  # bounds the memory
            images[chunk] = render_strokes(vary_hand(trace_strokes(ways[index], len(chunk), rng), turn, rng), rng)
    return images


def trace_strokes(way: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Write one way n times, each time through slightly other points: -> (n, samples, 2) points along its curves."""
    way = re.sub(r"(\S+)\s+>", r"\1 / \1", way)  # a corner ends one stroke and starts the next
    strokes = [np.array([p.split(",") for p in stroke.split()], float) / 100 - 0.5 for stroke in way.split("/")]
    # A point that two strokes share moves once, for both: strokes that meet still do.
    places, which = np.unique(np.concatenate(strokes), axis=0, return_inverse=True)
    points = places + rng.normal(0, 0.02, (n, *places.shape))
    curves = []  # a spline is linear in its points, so that one matrix draws the curves of all images
    for stroke in strokes:
        knots = np.r_[0, np.cumsum(np.hypot(*np.diff(stroke, axis=0).T))]  # the length of the way to each point
        samples = np.linspace(0, knots[-1], max(4, round(knots[-1] / 0.035)))  # less than a pixel apart
        curves.append(scipy.interpolate.CubicSpline(knots, np.eye(len(stroke)), bc_type="natural")(samples))
    return scipy.linalg.block_diag(*curves) @ points[:, which.ravel()]


def vary_hand(points: np.ndarray, turn: float, rng: np.random.Generator) -> np.ndarray:
    """Give each of n drawings a hand of its own: bent by smooth waves, narrowed, slanted, turned. (n, samples, 2)."""
    n = len(points)
    waves = np.sin(points @ rng.normal(0, 3, (n, 2, 6)) + rng.uniform(0, 2 * np.pi, (n, 1, 6)))
    x, y = np.moveaxis(points + waves @ rng.normal(0, 0.035, (n, 6, 2)), 2, 0)
    width = np.exp(rng.normal(-0.1, 0.23, (n, 1)))
    slant = rng.normal(0.12, 0.25, (n, 1))  # most hands lean to the right
    angle = rng.normal(0, turn, (n, 1))
    x = x * width - y * slant
    return np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], 2)


def render_strokes(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw n lines with pens of random width, framed as MNIST does it: (n, samples, 2) -> (n, 28, 28) uint8."""
    # Every sample leaves a round Gaussian blot. Blots are separable, so their sum is the product of two small matrices;
    # its logarithm is, smoothly, the squared distance from a pixel to the line in pen radii, and a ramp one pixel wide
    # at one radius makes the grey rim of an anti-aliased stroke.
    n, samples = points.shape[:2]
    extent = np.ptp(points, axis=1)
    # Much line in a small box leaves no room for a thick pen, which would fill the loops of an 8 but not a 1.
    crowding = np.linalg.norm(np.diff(points, axis=1), axis=2).sum(1) / extent.sum(1)
    radius = np.exp(rng.normal(np.log(1.22), 0.34, n)).clip(0.65, 3.4 * crowding**-1.2)[:, None]  # pixels
    # The frame: the longer side is 20 pixels, the pen included, and the centre of mass is the centre of the image.
    points = points * ((20 - 2 * radius) / extent.max(1, keepdims=True))[:, None]
    steps = np.linalg.norm(np.diff(points, axis=1, append=points[:, -1:]), axis=2).clip(0.1, 1)  # 1: the pen was lifted
    points = points + 14 - np.average(points, axis=1, weights=np.repeat(steps[..., None], 2, 2))[:, None]
    place = np.linspace(0, 1, samples) * rng.uniform(2, 12, (n, 1)) + rng.uniform(0, 2 * np.pi, (n, 1))
    pen = radius * (1 + rng.uniform(0, 0.25, (n, 1)) * np.sin(place))  # the hand presses harder here than there
    offsets = (np.arange(28) - points[..., None]) / pen[:, :, None, None]  # (n, samples, x or y, 28)
    blots = np.exp(-2 * offsets.astype(np.float32) ** 2)
    density = (np.sqrt(2 / np.pi) * steps / pen).astype(np.float32)  # makes the sum 1 in the middle of a line
    total = (blots[:, :, 1] * density[..., None]).transpose(0, 2, 1) @ blots[:, :, 0]
    distance = np.sqrt(np.maximum(-0.5 * np.log(total + 1e-30), 0))  # in pen radii
    rim, light = rng.uniform(0.7, 1.3, (n, 1, 1)), rng.uniform(0.9, 1.2, (n, 1, 1)).clip(max=1)
    return (255 * light * (0.5 + radius[..., None] * (1 - distance) / rim).clip(0, 1)).astype(np.uint8)


def draw_non_digits(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n images that show no digit, in random order: -> (n, 28, 28) uint8."""
    letters, marks = WAYS["letter"], WAYS["mark"]
    sizes = rng.multinomial(n, (0.4, 0.3, 0.2, 0.1))
    drawn = [
        draw_ways(letters, rng.integers(len(letters), size=sizes[0]), rng),
        *(draw_scribbles(len(part), rng) for part in np.array_split(range(sizes[1]), 1 + sizes[1] // 2000)),
        draw_ways(marks, rng.integers(len(marks), size=sizes[2]), rng, turn=0.4),
        draw_textures(sizes[3], rng),
    ]
    return rng.permutation(np.concatenate(drawn))


def draw_scribbles(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a curve through random points, a zigzag between them, or a row of loops: (n, 28, 28) uint8."""
    t = np.linspace(0, 6, 200)
    corners = rng.uniform(-0.5, 0.5, (n, 7, 2))
    curve = scipy.interpolate.CubicSpline(np.arange(7), corners, axis=1)(t)
    zigzag = np.maximum(1 - np.abs(t[:, None] - np.arange(7)), 0) @ corners  # linear interpolation as a matrix
    angle = t * rng.uniform(2.5, 5, (n, 1)) + rng.uniform(0, 2 * np.pi, (n, 1))
    circles = np.stack([np.cos(angle), np.sin(angle)], 2) * rng.uniform(0.1, 0.3, (n, 1, 2))
    way = np.stack([rng.choice((-0.2, 0.2), n), rng.normal(0, 0.07, n)], 1)  # more along the line than up or down it
    loops = circles + t[:, None] * way[:, None]
    kind = rng.integers(3, size=(n, 1, 1))
    return render_strokes(vary_hand(np.choose(kind, [curve, zigzag, loops]), 0.12, rng), rng)


def draw_textures(n: int, rng: np.random.Generator) -> np.ndarray:
    """Make noise, blobs, shades, stripes and blanks: (n, 28, 28) uint8."""
    noise = rng.uniform(0, 1, (n, 28, 28))
    blobs = scipy.ndimage.gaussian_filter(noise, (0, 1.5, 1.5)) * 6 - 2.5
    slope_x, slope_y = rng.normal(0, 1 / 27, (2, n, 1, 1))
    shade = 0.5 + slope_x * (np.arange(28) - 13.5) + slope_y * (np.arange(28)[:, None] - 13.5)
    stripes = 0.5 + 0.5 * np.sin(shade * rng.uniform(10, 60, (n, 1, 1)))
    blank = np.zeros((n, 28, 28)) + rng.integers(2, size=(n, 1, 1)) * rng.uniform(0, 1, (n, 1, 1))  # half of them black
    kind = rng.integers(5, size=(n, 1, 1))
    return (255 * np.choose(kind, [noise, blobs, shade, stripes, blank]).clip(0, 1)).astype(np.uint8)


def corrupt_digits(images: np.ndarray, labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Make n non-digits out of (m, 28, 28) uint8 images of digits and their (m,) labels: -> (n, 28, 28) uint8."""
    turns, splices, miscuts = rng.multinomial(n, (0.4, 0.25, 0.35))
    turned = images[np.resize(rng.permutation(np.flatnonzero(np.isin(labels, TURNABLE))), turns)]
    turned = np.concatenate([np.rot90(turned[::2], 1, (1, 2)), np.rot90(turned[1::2], 3, (1, 2))])
    first, second = pairs = rng.integers(len(images), size=(2, 10 * n + 100))  # about one pair in eight may be spliced
    fit = np.resize(np.flatnonzero(np.isin(10 * labels[first].astype(int) + labels[second], SPLICES)), splices)
    spliced = np.concatenate([images[first[fit], :14], images[second[fit], 14:]], axis=1)
    miscut = np.array([cut_between(*images[pair], rng) for pair in pairs.T[:miscuts]], np.uint8).reshape(-1, 28, 28)
    return rng.permutation(np.concatenate([turned, spliced, miscut]))


def cut_between(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Write two uint8 (28, 28) digits side by side, and cut out more than one of them, or no whole one: (28, 28)."""
    left, right = (image[:, np.flatnonzero(image.max(axis=0) > 50)] for image in (left, right))
    place = max(0, left.shape[1] + rng.integers(-3, 4))  # of the second, which may touch the first
    row = np.pad(right, ((0, 0), (place, 3))).astype(np.float32)
    row[:, : left.shape[1]] = np.maximum(row[:, : left.shape[1]], left)
    start, stop = rng.uniform(0.3, 0.7) * left.shape[1], place + rng.uniform(0.3, 0.7) * right.shape[1]
    start, stop = ((0, stop), (start, row.shape[1]), (start, stop), (0, row.shape[1]))[rng.integers(4)]
    return frame_digit(row[:, int(start) : math.ceil(stop)] / 255, thicken=False)


# ---------------------------------------------------------------------------------------------------------------------
# Data files: the download, .npz, CSV and IDX files -> the arrays of a data set. What they hold is checked, not trusted.
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
IDX_NAMES = "train-images?idx3-ubyte train-labels?idx1-ubyte t10k-images?idx3-ubyte t10k-labels?idx1-ubyte".split()
MAX_BYTES = 1_000_000 * 28 * 28 + 4096  # an array that is larger is taken for damaged
MAX_CSV_LINE, MAX_ROWS = 10_000, 1_000_000  # characters of a row; rows
CSV_ENDINGS = (".csv", ".csv.gz")
DOWNLOAD_PATIENCE_SECONDS = 10  # without a byte; a firewall that swallows packets must not cost minutes


def download_mnist(cache: Path) -> list[np.ndarray]:
    """The arrays of keras.datasets.mnist. Raises Failure where the download fails, or no byte arrives for a while."""
    # A time-out on the socket would not do: name servers and each of a host's many addresses have their own.
    outcome: list[Any] = [f"no data for {DOWNLOAD_PATIENCE_SECONDS} s"]  # until there are arrays, or another reason

    def load() -> None:
        keras.config.disable_interactive_logging()  # no progress bar; the setting is that of this thread alone
        try:
            outcome[0] = keras.datasets.mnist.load_data()
        except Exception as error:
            # Keras says "URL fetch failure on <address>: <code> -- <reason>"; the reason is what a user can act on.
            outcome[0] = describe(error).rpartition("-- ")[2]

    folders = cache.parent, Path("/tmp/.keras/datasets")  # Keras takes the second where the first is read-only
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    before, size = -1, 0
    while thread.is_alive() and size != before:  # as long as bytes arrive
        thread.join(DOWNLOAD_PATIENCE_SECONDS)
        before, size = size, sum(part.stat().st_size for folder in folders for part in folder.glob("*mnist.npz*"))
    result = outcome[0]
    if isinstance(result, str):
        raise Failure(f"MNIST is unavailable ({result}): put mnist.npz at {cache}, or name a copy with --data FILE.npz")
    return [array for pair in result for array in pair]


def read_npz(path: Path) -> list[np.ndarray]:
    """The four arrays of an .npz file, checked; nothing in it is ever unpickled. Raises Failure."""
    with blame(path, f"--data takes auto; {SOURCES}"):
        check_regular_file(path)
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as content:
            if any(archive.getinfo(f"{key}.npy").file_size > MAX_BYTES for key in NPZ_KEYS):
                raise ValueError(f"holds an array of more than {MAX_BYTES:,} bytes")
            arrays = [np.asarray(content[key]) for key in NPZ_KEYS]
    return check_digits(arrays, [f"{path}: {key}" for key in NPZ_KEYS])


def read_idx_folder(folder: Path) -> list[np.ndarray]:
    """The four arrays of MNIST's own file format (IDX), gzipped or not, checked. Raises Failure."""
    paths = []
    for name in IDX_NAMES:
        found = list(filter(os.path.isfile, [*folder.glob(name), *folder.glob(f"{name}.gz")]))
        if not found:
            raise Failure(f"{folder}: has no {name.replace('?', '-')} (or .gz); --data takes auto; {SOURCES}")
        paths.append(found[0])
    return check_digits([read_idx(path) for path in paths], [str(path) for path in paths])


def read_idx(path: Path) -> np.ndarray:
    """One IDX file -> uint8, images (n, 28, 28) or labels (n,), by what its header says. Raises Failure."""
    with blame(path, "copy it again"), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
        content = stream.read(MAX_BYTES)
        magic = int.from_bytes(content[:4], "big")
        dimensions = {0x0801: 1, 0x0803: 3}.get(magic)  # unsigned bytes in 1 and in 3 dimensions
        if dimensions is None:
            raise ValueError(f"begins with {magic}, not with 2051 (images) or 2049 (labels): not an IDX file")
        shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def find_csv(source: Path) -> list[Path]:
    """The CSV files that `--data` names: a file, or the train.csv of a folder and its test.csv; else none."""
    if not os.path.isdir(source):
        return [source] if source.name.lower().endswith(CSV_ENDINGS) else []
    for start in ("", "mnist_"):
        spelled = [[source / f"{start}{part}{ending}" for ending in CSV_ENDINGS] for part in ("train", "test")]
        train, test = ([path for path in paths if os.path.lexists(path)][:1] for paths in spelled)
        if train:
            return train + test
    return []


def read_csv_digits(train: Path, test: Path | None = None) -> tuple[list[np.ndarray], str]:
    """The four arrays and their origin; without labels in `test`, the last rows of `train` are the test set."""
    rows, test_rows = read_csv(train), read_csv(test) if test else None
    if rows.shape[1] != 785:
        raise Failure(f"{train}: its rows have no labels, which --data needs: a label and 784 pixels")
    names, origin = [str(train), str(test)], f"{train}, {test}"
    if test_rows is None or test_rows.shape[1] != 785:  # Kaggle's test.csv has no labels
        rows, test_rows = np.split(rows, [len(rows) - len(rows) // 7])
        names[1] = origin = f"{train}, its last seventh as test images"
    arrays = [part for table in (rows, test_rows) for part in (table[:, 1:].reshape(-1, 28, 28), table[:, 0])]
    return check_digits(arrays, [f"{name}: {part}" for name in names for part in ("pixels", "labels")]), origin


def read_csv(path: Path) -> np.ndarray:
    """A CSV file, with a header or not, gzipped or not: uint8 (n, 784), or with labels first (n, 785). Else Failure."""
    row = 0

    def rows_of(stream: TextIO) -> Iterator[str]:
        nonlocal row
        lines = filter(str.strip, iter(lambda: stream.readline(MAX_CSV_LINE), ""))
        first = next(lines, "")
        names = sum(field.strip().isdigit() for field in first.split(",")[:9]) < 5
        numbers = re.search(r",78[34]\s*$", first)  # of the columns, as pandas writes them
        for row, line in enumerate(lines if names or numbers else itertools.chain([first], lines), start=1):
            if row > MAX_ROWS:
                raise ValueError(f"there are more than {MAX_ROWS:,} rows")
            commas, label = line.count(","), line.partition(",")[0]
            if commas not in (783, 784):
                raise ValueError(f"it has {commas + 1} numbers")
            if commas == 784 and int(label) > 9:
                raise ValueError(f"the label is {label}, not 0 to 9")
            yield line

    with blame(path, "each row is a label and 784 pixels, or 784 pixels: whole numbers to 255, separated by commas"):
        check_regular_file(path)
        if path.stat().st_size > 4 * MAX_BYTES:
            raise ValueError(f"has more than {4 * MAX_BYTES:,} bytes")
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as stream:
            try:
                rows = np.loadtxt(rows_of(stream), np.uint8, delimiter=",", comments=None, ndmin=2)
            except ValueError as error:  # NumPy counts rows now from 0, now from 1
                text = re.sub(r" at row \d+|\.$|; use `usecols.*", "", str(error))
                raise ValueError(f"row {row}: {text}") from error
        if not len(rows):
            raise ValueError("has no rows")
    return rows


def check_digits(arrays: Sequence[np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """Return x_train, y_train, x_test, y_test, labels as uint8. Raises Failure where they are not images of digits."""
    for images, labels, image_name, label_name in zip(arrays[::2], arrays[1::2], names[::2], names[1::2], strict=True):
        if images.shape[1:] != (28, 28) or images.dtype != np.uint8:
            raise Failure(f"{image_name}: is {images.dtype} {images.shape}, not uint8 (n, 28, 28), 0 to 255")
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise Failure(f"{label_name}: is {labels.dtype} {labels.shape}, not whole numbers (n,)")
        if len(images) != len(labels):
            raise Failure(f"{label_name}: has {len(labels)} labels for {len(images)} images")
        wrong = set(labels.tolist()) ^ set(range(10))  # in one of them but not in the other
        if wrong:
            raise Failure(f"{label_name}: {min(wrong)} is missing, or no digit; the labels must be all of 0 to 9")
    return [array.astype(np.uint8, copy=False) for array in arrays]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: a file -> a 28 x 28 digit as MNIST would have made it -> digit, confidence, verdict
PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PICTURES_PER_BATCH = 100  # classified together; it limits the memory used
MAX_CARDS = 40  # in external_predictions.png
MAX_PIXELS = 80_000_000  # larger pictures are refused from their header, before any pixel is decoded
MAX_SIDE = 1000  # px; larger pictures are shrunk to this as early as the format allows
COARSE_SIDE = 100  # px; the long side of the small copy on which light and paper are judged
NARROW = 9  # px of the small copy: only a marker's strokes are wider, and light changes little over this distance
BOX_SIDE, DIGIT_SIDE = 20, 28  # MNIST: the ink fills a 20 x 20 box, centred by mass in 28 x 28
FINE = 6  # strokes are thickened at this many pixels to one of the 28 x 28
MIN_STROKE = 2.3  # px of 28: thinner strokes are thickened to this, about the width of MNIST's pens
MIN_CONTRAST = 0.12  # ink absorbs at least this share of the paper's light; with less, the sheet is blank
ACCEPTED_SHARE = 0.995  # of the validation digits are above the rejection threshold
USUAL_THRESHOLD = 4.5  # for a model without the metrics of its own run, where the rejection threshold is stored


def read_picture(path: Path) -> tuple[np.ndarray, float]:
    """A picture's first frame, float32 (height, width) grey in [0, 1], upright, on white; its reduction. Or Failure."""
    with blame(path, f"{', '.join(PICTURE_FORMATS)} files of up to {MAX_PIXELS // 10**6} megapixels can be read"):
        check_regular_file(path)
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"has {image.width} x {image.height} pixels")
            long_side = max(image.size)
            image.draft("L", (MAX_SIDE, MAX_SIDE))  # JPEG only: decodes at 1/2, 1/4 or 1/8 of the size, in grey
            image.load()
            deep = image.mode.startswith(("I", "F"))  # 16 or 32 bits; converting these to "L" would clip, not scale
            if image.mode in ("L", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
                image.thumbnail((MAX_SIDE, MAX_SIDE), reducing_gap=2.0)  # saves memory; other modes need the conversion
            grey = image.convert("F" if deep else "LA" if image.has_transparency_data else "L")
        grey.thumbnail((MAX_SIDE, MAX_SIDE), reducing_gap=2.0)
        levels = np.asarray(ImageOps.exif_transpose(grey), np.float32)
    shrunk = long_side / max(grey.size)
    if grey.mode == "LA":  # on white
        return 1 - (1 - levels[..., 0] / 255) * levels[..., 1] / 255, shrunk
    if not deep:
        return levels / 255, shrunk
    levels = np.nan_to_num(levels, posinf=0, neginf=0).clip(0)
    brightest = levels.max()  # a TIFF does not tell which value is white
    white = 65535 if image.mode.startswith("I;16") or brightest > 255 else 255 if brightest > 1 else 1
    return levels / np.float32(max(white, brightest)), shrunk


def scale(levels: np.ndarray, long_side: float) -> np.ndarray:
    """Resize a 2-D array, proportions kept, to float32; where it shrinks, a pixel is a mean of what lies there."""
    height, width = (max(1, round(side * long_side / max(levels.shape))) for side in levels.shape)
    return np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BILINEAR))


def border_of(levels: np.ndarray) -> np.ndarray:
    """The outermost rows and columns of a 2-D array, as one row."""
    return np.r_[levels[0], levels[-1], levels[:, 0], levels[:, -1]]


def along_border(labels: np.ndarray, count: int) -> np.ndarray:
    """Which of the connected components 1..count lie along the picture's border, as a table does: bool (count,)."""
    return np.bincount(border_of(labels), minlength=count + 1)[1:] > 0.3 * min(labels.shape)


def ink_is_dark(small: np.ndarray) -> bool:
    """Tell dark ink on light paper from light ink on dark, by the skew of the levels about those of the paper."""
    small = small.astype(np.float64)
    paper = np.median(np.append(small, np.resize(border_of(small), small.size)))  # right where strokes are thick
    blurred = scipy.ndimage.gaussian_filter(small, max(1.5, max(small.shape) / 24))  # right where light is uneven
    skews = [(a * a * a).mean() / ((a * a).mean() ** 1.5 + 1e-9) for a in (small - paper, small - blurred)]
    return sum(skews) <= 0


def is_only_light(small: np.ndarray) -> bool:
    """Whether a picture shows nothing but a gradient or a spot of light: a quadratic in x and y fits all of it."""
    y, x = np.indices(small.shape) / COARSE_SIDE
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    solution = np.linalg.lstsq(terms, small.ravel(), rcond=None)[0]
    return bool(np.abs(terms @ solution - small.ravel()).max() < MIN_CONTRAST / 2)


def estimate_background(dark: np.ndarray) -> np.ndarray:
    """Estimate the brightness of the bare paper at each pixel of a picture with dark ink: float32, same shape."""
    small = scale(dark, min(COARSE_SIDE, max(dark.shape)))
    closed = scipy.ndimage.grey_closing(small, size=NARROW)  # replaces narrow dark things by the paper around them
    paper = scipy.ndimage.grey_closing(closed, size=max(NARROW, max(small.shape) // 2))  # wide ones too, and shadows
    depth = (paper - closed) / np.maximum(paper, 0.1)
    labels, count = scipy.ndimage.label(depth > 0.1)
    outline = np.where(scipy.ndimage.binary_erosion(labels > 0, border_value=1), 0, labels)
    steps = scipy.ndimage.mean(scipy.ndimage.morphological_gradient(closed, 3), outline, np.arange(1, count + 1))
    sharp = steps > 0.4 * scipy.ndimage.mean(depth, labels, np.arange(1, count + 1))
    # A thick stroke is darker than any shadow, or has sharp edges and does not lie along the border.
    thick = (depth > 0.5) | np.append(False, sharp & ~along_border(labels, count))[labels]
    thick = scipy.ndimage.binary_dilation(thick, iterations=2)
    if not thick.all():  # replace thick strokes by the nearest paper, so that a narrow closing suffices
        nearest = scipy.ndimage.distance_transform_edt(thick, return_distances=False, return_indices=True)
        closed = scipy.ndimage.grey_closing(small[tuple(nearest)], size=NARROW)
    smooth = Image.fromarray(scipy.ndimage.gaussian_filter(closed, max(small.shape) / 100))
    return np.asarray(smooth.resize(dark.shape[::-1], Image.Resampling.BILINEAR))


def remove_lines(ink: np.ndarray, blank: float) -> np.ndarray:
    """Remove boxes and tables, also where what is in them touches their lines, and lines that cross the picture."""
    if min(ink.shape) < 64 or (ink > blank).mean() > 0.4:  # too small for lines, or no drawing
        return ink
    ink, (labels, starts, stops) = ink.copy(), find_parts(ink > blank)
    for mark in np.flatnonzero((stops - starts).min(axis=1) >= 8):  # in a smaller one, no line is thin
        (left, top), (right, bottom) = starts[mark], stops[mark]
        place = np.s_[top:bottom, left:right]
        ink[place] = remove_box(ink[place], labels[place] == mark + 1, blank)
    return remove_ruled_lines(ink, np.ones(ink.shape, bool), blank, max(2, round(0.008 * min(ink.shape))))


def remove_box(ink: np.ndarray, mark: np.ndarray, blank: float) -> np.ndarray:
    """Remove the lines of a mark, a mask, from the ink where it lies, if it is a box or a table around something."""
    ink, mark = np.pad(ink, 1), np.pad(mark, 1)
    inside = scipy.ndimage.binary_fill_holes(mark)
    depth = np.ceil(scipy.ndimage.distance_transform_edt(inside)).astype(int)  # 1 along the outline
    inked, pixels = np.bincount(depth[mark], minlength=depth.max() + 1), np.bincount(depth.ravel())
    thick = int(np.argmax(inked[1:] < 0.6 * pixels[1:]))  # of its outer lines; 0 if it has no hole
    if 1 <= thick <= 0.1 * min(ink.shape):
        edge = inside & (depth <= thick + 1)
        rest = remove_ruled_lines(ink, inside, blank, thick)
        if rest[edge].sum() < 0.2 * ink[edge].sum() < rest[inside & ~edge].sum():
            bits = (rest > blank) & inside & (depth <= 2 * thick)
            bits &= ~scipy.ndimage.binary_propagation((rest > blank) & ~bits, mask=rest > blank)
            ink = np.where(bits, 0, rest)
    return ink[1:-1, 1:-1]


def remove_ruled_lines(ink: np.ndarray, inside: np.ndarray, blank: float, thickest: int) -> np.ndarray:
    """Remove thin lines that cross a region, a mask, from side to side or from top to bottom; `thickest` in pixels."""
    level = remove_level_lines(ink, inside, blank, thickest)
    return remove_level_lines(level.T, inside.T, blank, thickest).T


def remove_level_lines(ink: np.ndarray, inside: np.ndarray, blank: float, thickest: int) -> np.ndarray:
    """Remove thin near-horizontal lines that cross a region, except where a taller or darker stroke crosses them."""
    inked, width = inside & scipy.ndimage.binary_dilation(ink > blank, np.ones((3, 1))), ink.shape[1]
    if inked.any(0).mean() < 0.8:  # no line crosses it
        return ink

    def line_at(slope: float, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.round(rows + slope * (width / 2 - columns)).astype(int) + width  # + width: none is negative

    places, slopes = np.nonzero(inked), np.linspace(-0.25, 0.25, 101)
    best = max(slopes, key=lambda slope: np.square(np.bincount(line_at(slope, *places))).sum())  # where ink lines up
    line = line_at(best, *np.indices(ink.shape))
    length = np.bincount(line[inside], minlength=line.max() + 1)  # shorter where it leaves by the top or the bottom
    ruled = (np.bincount(line[inked], minlength=length.size) > 0.8 * length) & (length > 0.2 * width)
    if not ruled.any():
        return ink
    without = scipy.ndimage.grey_opening(ink, size=(2 * thickest + 1, 1))  # only what is taller than a line
    pale = ink < 1.5 * np.quantile(ink[ruled[line] & inked], 0.75)  # as the lines are; what is darker is a stroke
    return np.where(pale & scipy.ndimage.binary_dilation(ruled, iterations=2)[line], without, ink)


def find_parts(inked: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Connected components of a mask: 1 to n where each lies; left and top, and right and bottom, of each, (n, 2)."""
    labels, count = scipy.ndimage.label(inked, np.ones((3, 3)))
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in scipy.ndimage.find_objects(labels)]
    return labels, *np.hsplit(np.reshape(boxes, (count, 4)), 2)


def select_parts(ink: np.ndarray, blank: float, several: bool) -> np.ndarray:
    """Choose the connected components of the ink above `blank` that belong to one drawing, or to any: a bool mask."""
    labels, starts, stops = find_parts(ink > blank)
    extent = (stops - starts).max(1)
    smallest = max(6, 0.015 * max(ink.shape)) if several else max(4, 0.05 * max(ink.shape))
    if extent.max(initial=0) < smallest:  # nothing, or dust or noise on a blank sheet
        return np.zeros(ink.shape, bool)
    edge = along_border(labels, len(extent))
    if several:
        return np.append(False, (extent > 0.012 * min(ink.shape)) & (extent > 3) & ~edge)[labels]
    mass = np.bincount(labels.ravel(), ink.ravel())[1:]
    if (~edge & (extent > max(4, 0.1 * min(ink.shape))) & (mass > 0.005 * mass.max())).any():
        mass[edge] = 0  # a table's edge or a shadow, beside something else
    large = mass > 0.15 * mass.max()
    top_left, bottom_right = starts[large].min(0), stops[large].max(0)
    near = np.maximum(top_left - stops, starts - bottom_right).max(1) < 0.5 * (bottom_right - top_left).max()
    kept = large | (near & (mass > 0.01 * mass.max()) & (np.bincount(labels.ravel())[1:] > 2))  # else: specks
    if mass[kept].sum() < 0.5 * mass.sum():  # a texture, not a drawing: it is kept whole, so that it stays one
        kept = mass > 0
    return np.append(False, kept)[labels]


def segment_ink(grey: np.ndarray, several: bool = False) -> np.ndarray:
    """Find the drawing, or several, in a grey picture: float32 (height, width) in [0, 1], 0 where only paper is."""
    small = scale(grey, min(COARSE_SIDE, max(grey.shape)))
    if small.shape == grey.shape and is_only_light(small):  # in a large one, light changes too slowly to look like ink
        return np.zeros_like(grey)
    dark = grey if ink_is_dark(small) else 1 - grey
    paper = estimate_background(dark)
    ink = (paper - dark) / np.maximum(paper, 0.25)  # the share of light absorbed: the same in light and shade
    low, middle = np.quantile(ink, [0.2, 0.4])  # both are paper, unless the picture is mostly ink
    blank = max(MIN_CONTRAST / 2, middle + 9 * (middle - low))  # above what noise reaches
    ink = remove_lines(ink, blank)
    kept = select_parts(ink, blank, several)
    full = np.quantile(ink[kept], 0.75) if kept.any() else 0
    if full < MIN_CONTRAST * np.sqrt(max(1, COARSE_SIDE / max(ink.shape))):  # light is less even in a tiny picture
        return np.zeros_like(ink)
    drawn = scipy.ndimage.binary_propagation(kept & (ink > 0.5 * full), mask=ink > max(0.25 * full, blank))
    drawn = scipy.ndimage.binary_dilation(drawn, np.ones((3, 3)))  # with the soft edges of its strokes
    return np.where(drawn, np.clip((ink - middle) / (0.95 * full), 0, 1), 0).astype(np.float32)


def frame_digit(ink: np.ndarray, thicken: bool = True) -> np.ndarray:
    """Crop ink, float32 (height, width) in [0, 1], fit it in a box, centre it by mass: uint8 (28, 28); 0 if blank."""
    inked = np.uint8(ink > 0.15)
    if not inked.any():  # also where there are no pixels, of which `find_objects` makes an error
        return np.zeros((DIGIT_SIDE, DIGIT_SIDE), np.uint8)
    drawn = ink[scipy.ndimage.find_objects(inked)[0]]
    drawn = fit_in_box(drawn) if thicken else scale(drawn, BOX_SIDE)
    top, left = (round(DIGIT_SIDE / 2 + mean) for mean in scipy.ndimage.center_of_mass(drawn))
    digit = np.pad(drawn.astype(np.float64), DIGIT_SIDE)[top : top + DIGIT_SIDE, left : left + DIGIT_SIDE]
    return np.round(255 * digit).astype(np.uint8)


def stroke_width(ink: np.ndarray) -> float:
    """The mean width of strokes in pixels: across a stroke the mean distance to its edge is a quarter of its width."""
    inside = np.pad(ink > 0.5, 1)
    distances = scipy.ndimage.distance_transform_edt(inside)[inside] - 0.5
    return 4 * float(distances.mean()) if distances.size else 0.0


def fit_in_box(drawn: np.ndarray) -> np.ndarray:
    """Scale cropped ink to fill a 20 x 20 box, proportions kept; thicken thin strokes, which adds an empty margin."""
    if max(drawn.shape) == BOX_SIDE:  # as in MNIST: unchanged
        return drawn
    drawn = scipy.ndimage.grey_dilation(drawn, size=max(1, max(drawn.shape) // (BOX_SIDE * FINE)))  # or thin ones fade
    missing = MIN_STROKE - stroke_width(scale(drawn, BOX_SIDE * FINE)) / FINE  # px of 28
    if missing <= 0:
        return scale(drawn, BOX_SIDE)
    fine = scale(drawn, (BOX_SIDE - missing) * FINE)
    fine = np.pad(fine, [(2 * FINE, 2 * FINE + -side % FINE) for side in fine.shape])
    outside = scipy.ndimage.distance_transform_edt(fine < 0.5)
    fine = np.maximum(fine, np.clip(FINE * missing / 2 + 1 - outside, 0, 1))
    return fine.reshape(len(fine) // FINE, FINE, -1, FINE).mean((1, 3))


def digit_scores(probabilities: np.ndarray) -> np.ndarray:
    """How digit-like each image is, in nats, float64 (n,): its largest logit minus the mean of all ten."""
    logits = log_probabilities(probabilities)
    return logits.max(axis=1) - logits.mean(axis=1)  # 0 if all are equal: the target for non-digits


def list_pictures(paths: Sequence[Path], flag: str) -> list[Path]:
    """Replace each folder by the pictures in it, sorted by name. Raises Failure for a folder without any."""
    pictures = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            inside = [file for file in path.iterdir() if file.suffix.lower() in PICTURE_ENDINGS and file.name[0] != "."]
        if not inside:
            raise Failure(f"{flag} {path}: holds no picture ({', '.join(PICTURE_ENDINGS)})")
        pictures += sorted(inside)
    return pictures


Seen = tuple[np.ndarray, Any]  # in a picture: images for the network, uint8 (n, 28, 28), and what else is needed
DIGIT_COLUMNS = "path digit confidence score verdict p0 p1 p2 p3 p4 p5 p6 p7 p8 p9".split()


def look_at_files(
    model: keras.Model, paths: Sequence[Path], look: Callable[[Path], Seen], threads: int, progress: bool
) -> Iterator[tuple]:
    """For each path: the path, what else is seen, or a Failure, and the probabilities of the images, (n, 10)."""

    def try_to_look(path: Path) -> Seen:
        try:
            return look(path)
        except Failure as failure:
            return np.zeros((0, 28, 28), np.uint8), failure

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), PICTURES_PER_BATCH):
            batch = paths[start : start + PICTURES_PER_BATCH]
            images, seen = zip(*pool.map(try_to_look, batch), strict=True)
            together = np.concatenate(images)
            probabilities = predict_probabilities(model, together) if len(together) else np.zeros((0, 10))
            parts = np.split(probabilities, np.cumsum([len(each) for each in images])[:-1])
            yield from zip(batch, seen, parts, strict=True)
            if progress:
                say(f"{start + len(batch):,} of {len(paths):,} pictures", sys.stderr)


def look_at_digit(path: Path) -> Seen:
    """The digit that a picture shows; a thumbnail of the picture, and the digit."""
    grey, _ = read_picture(path)
    digit = frame_digit(segment_ink(grey))
    thumbnail = scale(grey, min(200, max(grey.shape)))
    return digit[np.newaxis], [np.round(255 * thumbnail).astype(np.uint8), digit]


def tell_digit(path: Path, seen: list[np.ndarray], probabilities: np.ndarray, threshold: float) -> tuple[list, Card]:
    """The row of a picture (path, digit, confidence, score, verdict, p0 ... p9), and its card."""
    p = probabilities[0]
    score = digit_scores(probabilities)[0] * seen[1].any()  # without ink there is no digit
    best, verdict = int(p.argmax()), "digit" if score >= threshold else "not-a-digit"
    row = [printable(path), str(best), f"{p[best]:.4f}", f"{score:.4f}", verdict, *(f"{each:.6f}" for each in p)]
    text = f"{best}, {p[best]:.1%}" if verdict == "digit" else "not a digit"
    return [row], (short_name(path), text, verdict == "digit", seen, p, best)


def shows_several(thumbnail: np.ndarray, digit: np.ndarray) -> bool:
    """Whether a picture that is not tiny shows tall marks side by side, with a gap between them, as no digit does."""
    marks, count = scipy.ndimage.label((digit > 60).any(axis=0))
    heights = [np.ptp(np.flatnonzero((digit[:, marks == mark] > 60).any(axis=1))) for mark in range(1, count + 1)]
    large = min(thumbnail.shape) >= 20 and max(thumbnail.shape) >= 60
    return large and sum(height > 0.7 * max(heights) for height in heights) > 1


def short_name(path: Path) -> str:
    """The name of a file, shortened in the middle, for a plot."""
    name = printable(path.name)
    return name if len(name) <= 26 else f"{name[:12]}...{name[-11:]}"


def printable(text: object) -> str:
    """A name in which control characters and broken encodings are escaped, so that it cannot add columns or lines."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: a picture -> the numbers in it, line by line. Marks that may hold several digits are cut in more places than
# needed. The network says which unions of neighbouring pieces are digits, and the reading is the best way through them
# (LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998).
LINE_HEIGHT = 60  # px, to which the digits of a line are scaled before they are cut
CUT_STEP, CUT_REACH = 2.5, 6  # px from one cut to the next, and how far a cut may swerve to where less ink is
CUT_SLANTS = 0.0, 0.3, 0.6  # px to the right for one px up; a line is cut with each of them, and the best reading taken
MAX_CUT_MARKS = 60  # in a picture; more of them are handwriting, where cuts find no number but take minutes
NUMBER_COLUMNS = "path line number confidence left top width height digits".split()
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Piece(NamedTuple):
    """A mark in a line, or a slice of one: float32 ink (height, width)."""

    ink: np.ndarray
    box: Box
    cut: bool = False  # off the piece before it


class Digit(NamedTuple):
    """What may be a digit, the union of pieces[first:stop] of a line, and as what it was read."""

    first: int
    stop: int
    image: np.ndarray  # uint8 (28, 28)
    box: Box
    cut: bool  # from a neighbour
    text: str = ""  # a digit or a question mark
    confidence: float = 0.0
    score: float = 0.0  # how far above the rejection threshold; negative below it


def find_lines(grey: np.ndarray) -> list[tuple[list, Callable[[Box], Box]]]:
    """Lines of marks in a picture, float32 (height, width), from top to bottom, and where boxes in them lie in it."""
    sheet, left, top = crop_to_sheet(grey)
    ink = segment_ink(sheet, several=True)
    angle = find_tilt(ink)
    level = np.asarray(Image.fromarray(ink).rotate(angle, Image.Resampling.BILINEAR, expand=True))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    lines, marks_of_lines = [], sort_marks(level)
    joined = sum(mark.ink.shape[1] > 1.2 * height for marks, height in marks_of_lines for mark in marks)
    slants = CUT_SLANTS if joined <= MAX_CUT_MARKS else [None]
    for marks, height in marks_of_lines:
        zoom = LINE_HEIGHT / height
        scaled = [scale_mark(mark, zoom) for mark in marks]
        sliced = [[piece for mark in scaled for piece in cut_mark(*mark, slant)] for slant in slants]
        # Without a cut, one way is like another; with one, the uncut way is among its unions.
        sliced = [pieces for pieces in sliced if any(piece.cut for piece in pieces)] or sliced[:1]
        ways = [join_pieces(pieces) for pieces in sliced]

        def place(box: Box, zoom: float = zoom) -> Box:
            x, y = np.array([box[0::2] * 2, np.repeat(box[1::2], 2)]) / zoom - np.reshape(level.shape[::-1], (2, 1)) / 2
            x, y = cos * x - sin * y + ink.shape[1] / 2 + left, sin * x + cos * y + ink.shape[0] / 2 + top
            return x.min(), y.min(), x.max(), y.max()

        lines.append((ways, place))
    return lines


def crop_to_sheet(grey: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The paper alone where it lies, light, on a dark table, and its left and top; else the whole picture."""
    small = scale(grey, min(COARSE_SIDE, max(grey.shape)))
    labels = scipy.ndimage.label(small > np.quantile(small, (0.02, 0.98)).mean())[0]
    paper = scipy.ndimage.binary_fill_holes(labels == 1 + np.bincount(labels.ravel(), minlength=2)[1:].argmax())
    if not 0.15 < paper.mean() < 0.97 or np.median(small[~paper]) > 0.5 * np.median(small[paper]):
        return grey, 0, 0
    y, x = np.nonzero(paper)
    turns = [(math.cos(angle), math.sin(angle)) for angle in np.radians(np.arange(-15, 16))]
    rectangle = min(np.ptp(x * cos + y * sin) * np.ptp(y * cos - x * sin) for cos, sin in turns)
    inner = Image.fromarray(scipy.ndimage.binary_erosion(paper, iterations=2).astype(np.float32))
    inner = np.asarray(inner.resize(grey.shape[::-1], Image.Resampling.BILINEAR)) > 0.5
    if len(x) < 0.85 * rectangle or not inner.any():
        return grey, 0, 0
    rows, columns = scipy.ndimage.find_objects(inner.astype(int))[0]
    nearest = scipy.ndimage.distance_transform_edt(~inner[rows, columns], return_distances=False, return_indices=True)
    return grey[rows, columns][tuple(nearest)], columns.start, rows.start


def find_tilt(ink: np.ndarray) -> float:
    """The angle in degrees, counterclockwise, by which to turn a picture so that its lines are level; 0 if in doubt."""
    labels, count = scipy.ndimage.label(ink > 0.4)
    y, x = np.nonzero(labels)
    if count < 3:
        return 0.0
    height = np.median([rows.stop - rows.start for rows, _ in scipy.ndimage.find_objects(labels)])
    angles = np.arange(-12.0, 13.0)
    tilted = (y - np.tan(np.radians(angles))[:, None] * (x - ink.shape[1])) / max(1, height / 6) + 2 * ink.shape[1]
    sharpness = [np.square(np.bincount(row)).sum() for row in tilted.astype(int)]  # ink gathers in level lines
    return angles[np.argmax(sharpness)] if max(sharpness) > 1.05 * sharpness[12] else 0.0


def sort_marks(ink: np.ndarray) -> list[tuple[list[Piece], float]]:
    """Sort connected marks into lines: of each its marks, from left to right, and the height of its digits."""
    labels, starts, stops = find_parts(ink > 0.4)
    (left, top), (right, bottom), (width, height) = starts.T, stops.T, (stops - starts).T
    mass = np.bincount(labels.ravel(), ink.ravel(), len(height) + 1)[1:]
    inside = ((starts[:, None] < starts) & (stops[:, None] > stops)).all(axis=2)
    frame = (mass < 0.25 * height * width) & (inside @ mass > 0.2 * mass)  # of a form, around other marks
    rule = (width > 8 * height) & (width > 0.3 * ink.shape[1])
    order = np.flatnonzero(~frame & ~rule)
    order = order[np.argsort(height[order])]
    if not len(order):
        return []
    narrow = width[order] < 0.2 * height[order]
    ink_up_to = np.cumsum(np.where(narrow, 0.01, 1) * mass[order])
    usual = height[order][np.searchsorted(ink_up_to, ink_up_to[-1] / 2)]  # half of the ink, but for ones, is higher
    order = order[~narrow | (height[order] < 1.3 * usual)]  # not the sides of a box
    high = height[order] > 0.45 * usual
    small = order[~high & (np.maximum(height, width)[order] > 0.12 * usual)]
    found = []
    for line in split_lines(order[high], top, bottom):
        marks, digit_height = [], max(0.6 * usual, np.median(height[line]))
        highest, lowest = np.median(top[line]) - 0.25 * usual, np.median(bottom[line]) + 0.1 * usual
        centre = (top + bottom)[small] / 2
        line = np.append(line, small[(highest < centre) & (centre < lowest)])
        for mark in line[np.argsort((left + right)[line])]:
            a, b, c, d = box = (*starts[mark], *stops[mark])
            marks.append(Piece(np.where(labels[b:d, a:c] == mark + 1, ink[b:d, a:c], 0), box))
        found.append((marks, digit_height))
    return found


def split_lines(marks: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> list[list[int]]:
    """Sort marks, indices into `top` and `bottom`, int (n,), into lines, from top to bottom."""
    lines: list[list[int]] = []
    for mark in sorted(marks, key=lambda mark: top[mark] + bottom[mark]):
        spans = [(np.median(top[line]), np.median(bottom[line])) for line in lines]
        shared = [(min(b, bottom[mark]) - max(a, top[mark])) / min(b - a, bottom[mark] - top[mark]) for a, b in spans]
        if max(shared, default=0) > 0.5:
            lines[int(np.argmax(shared))].append(mark)
        else:
            lines.append([mark])
    return sorted(lines, key=lambda line: np.median(top[line]))


def scale_mark(mark: Piece, zoom: float) -> tuple[Piece, np.ndarray, float]:
    """A mark scaled as its line is, margin 3 px, strokes thickened; its ink and stroke width before they were."""
    size = max(2, round(mark.ink.shape[1] * zoom)), max(2, round(mark.ink.shape[0] * zoom))
    ink = scipy.ndimage.grey_dilation(mark.ink, size=max(1, round(0.5 / zoom)))  # or thin strokes fade
    ink = np.pad(Image.fromarray(ink).resize(size, Image.Resampling.BILINEAR), 3)
    stroke = stroke_width(ink)
    margin = max(0.0, MIN_STROKE * LINE_HEIGHT / BOX_SIDE - stroke) / 2
    outside = scipy.ndimage.distance_transform_edt(ink < 0.5)
    thick = np.maximum(ink, np.clip(margin + 1 - outside, 0, 1)) if margin else ink
    left, top = (round(side * zoom) - 3 for side in mark.box[:2])
    return Piece(thick, (left, top, left + thick.shape[1], top + thick.shape[0])), ink, stroke


def cut_mark(mark: Piece, thin: np.ndarray, stroke: float, slant: float | None) -> list[Piece]:
    """Cut a scaled mark from top to bottom, often, if a slant is given; `thin` is its ink, of that stroke width."""
    height, width = np.array(thin.shape) - 6  # without the margin
    paths = np.empty((0, len(thin)), int)
    if slant is not None and width > 0.6 * LINE_HEIGHT and height > 0.4 * LINE_HEIGHT:
        paths = find_cuts(thin, slant)
        left = np.arange(thin.shape[1]) < paths[:, :, np.newaxis]
        tall = [((thin > 0.5) & side).any(axis=2).sum(axis=1) > 0.65 * height for side in (left, ~left)]
        # Most narrow marks are one digit. Two digits of that width just touch, in about the width of a stroke.
        shallow = thin[np.arange(len(thin)), paths].sum(axis=1) < 1.8 * stroke
        paths = paths[tall[0] & tall[1] & (shallow | (width > LINE_HEIGHT))]
    slice_of = (np.arange(thin.shape[1]) >= paths[:, :, np.newaxis]).sum(axis=0)  # how many cuts are to the left
    pieces, (left, top, _, _) = [], mark.box
    for index in range(len(paths) + 1):
        part = np.where(slice_of == index, mark.ink, 0)
        for y, x in scipy.ndimage.find_objects(np.uint8(part > 0.15)):
            box = left + x.start, top + y.start, left + x.stop, top + y.stop
            pieces.append(Piece(part[y, x], box, bool(pieces)))
    return pieces


def find_cuts(ink: np.ndarray, slant: float) -> np.ndarray:
    """Paths along little ink from the top to the bottom of a mark: columns, int (cuts, height)."""
    (y, x), height = np.nonzero(ink > 0.5 * ink.max()), len(ink)
    upright = x + slant * (y - height / 2)
    starts = np.arange(upright.min() + CUT_STEP, upright.max(), CUT_STEP)
    reach = np.arange(-CUT_REACH, CUT_REACH + 1)
    lines = starts - slant * (np.arange(height)[:, np.newaxis] - height / 2)
    columns = np.round(lines[..., np.newaxis] + reach).astype(int).clip(0, ink.shape[1] - 1)  # (height, cuts, reach)
    cost = ink[np.arange(height)[:, np.newaxis, np.newaxis], columns] + 0.08 * np.abs(reach)
    total, came_from = np.pad(cost[0], ((0, 0), (1, 1)), constant_values=np.inf), []
    for row in cost[1:]:  # the cheapest path to each place, from one of the three above it
        options = np.stack([total[:, :-2] + 0.2, total[:, 1:-1], total[:, 2:] + 0.2])
        came_from.append(options.argmin(axis=0) - 1)
        total[:, 1:-1] = row + options.min(axis=0)
    cuts = np.arange(len(starts))
    path = [total[:, 1:-1].argmin(axis=1)]
    for steps in reversed(came_from):
        path.append(path[-1] + steps[cuts, path[-1]])
    return columns[np.arange(height), cuts[:, np.newaxis], np.transpose(path[::-1])]


def join_pieces(pieces: Sequence[Piece]) -> tuple[list[float], list[Digit]]:
    """The nats that it costs to leave out each piece of a line, and all unions of about the size of a digit."""
    costs, candidates = [], []
    cut_off = [*(piece.cut for piece in pieces), False]
    for first, piece in enumerate(pieces):
        for stop in range(first + 1, len(pieces) + 1):
            parts = pieces[first:stop]
            lefts, tops, rights, bottoms = zip(*(part.box for part in parts), strict=True)
            left, top, right, bottom = box = min(lefts), min(tops), max(rights), max(bottoms)
            cut = cut_off[first] or cut_off[stop]
            if len(parts) == 1:
                dot = bottom - top < 0.45 * LINE_HEIGHT and not cut
                costs.append((0 if dot else 8) + 5 * piece.ink.size / LINE_HEIGHT**2)
            elif right - left > 1.5 * LINE_HEIGHT:
                break  # no longer union is narrower
            if bottom - top < 0.4 * LINE_HEIGHT or (cut and right - left > 1.15 * LINE_HEIGHT):
                continue
            union = np.zeros((bottom - top, right - left), np.float32)
            for ink, (a, b, c, d), _ in parts:
                place = union[b - top : d - top, a - left : c - left]
                np.maximum(place, ink, out=place)
            image = frame_digit(union, thicken=False)
            candidates.append(Digit(first, stop, image, box, cut))
    return costs, candidates


def read_line(ways: list, readings: Iterator[tuple[np.ndarray, float]]) -> list[Digit]:
    """The digits on the shortest path through a line, however it is cut; `readings`: probabilities, score of each."""
    paths = []  # the sum of the doubts in nats, and the digits
    for costs, candidates in ways:
        steps = [[(cost, index, [])] for index, cost in enumerate(costs)]  # past each piece: it is left out, or
        for candidate, (p, score) in zip(candidates, itertools.islice(readings, len(candidates)), strict=True):
            text = str(p.argmax()) if score > -1.5 else "?"
            digit = candidate._replace(text=text, confidence=float(p.max()), score=float(score))
            steps[digit.stop - 1].append((doubt(digit, p.argmax() == 1), digit.first, [digit]))
        best: list[tuple[float, list[Digit]]] = [(0.0, [])]  # up to each piece
        for options in steps:
            longer = [(best[first][0] + nats, best[first][1] + digits) for nats, first, digits in options]
            best.append(min(longer, key=lambda path: path[0]))
        paths.append(best[-1])
    return min(paths, key=lambda path: path[0])[1]


def doubt(digit: Digit, one: bool) -> float:
    """How improbable it is, in nats, that something was read rightly as one whole digit, perhaps a one."""
    width, height = digit.box[2] - digit.box[0], digit.box[3] - digit.box[1]
    nats = 0.7 * max(0, 5 - digit.score) - 0.5 * math.log(digit.confidence) + 6 * max(0, 0.75 - height / LINE_HEIGHT)
    nats += 2 * (digit.text == "?") + digit.cut * (0.4 + one)  # many a stroke of something else looks like a one
    return float(min(nats, 8 * max(1, width / (0.6 * LINE_HEIGHT))))  # beyond that it is rather no digit


def split_numbers(digits: Sequence[Digit]) -> list[list[Digit]]:
    """Begin a new number, or a word, where the gap is wider than usual."""
    gaps = [max(0, right.box[0] - left.box[2]) for left, right in itertools.pairwise(digits)]
    widest = 0.45 * LINE_HEIGHT + 1.5 * sorted(gaps)[(len(gaps) - 1) // 2] if gaps else 0
    starts = [0, *(index for index, gap in enumerate(gaps, start=1) if gap > widest), len(digits)]
    return [list(digits[start:stop]) for start, stop in itertools.pairwise(starts) if start < stop]


def is_word(number: Sequence[Digit], among_numbers: bool = False) -> bool:
    """Whether these are rather letters: they barely pass for digits, are not level, or look like strokes of letters."""
    # Letters are full of upright strokes, and the arch that is cut off an n is a 7. Weights and limits were chosen on
    # made numbers of MNIST's validation images, drawn digits and fonts, apart and touching, and on words of fonts.
    # Of a text, and whether it is cut off: the weight of its score, and what is taken off for each.
    strokes = {("1", False): (0.7, 0.6), ("1", True): (0.0, 1.0), ("7", True): (0.5, 1.0)}
    scores, tops, heights = np.transpose([(digit.score, digit.box[1], digit.box[3] - digit.box[1]) for digit in number])
    weights, penalties = np.transpose([strokes.get((digit.text, digit.cut), (1.0, 0.0)) for digit in number])
    evidence = (weights * scores).mean() + 0.4 * scores.min() - penalties.sum()
    evidence -= 5 * (tops.std() + heights.std()) / LINE_HEIGHT
    unread = np.mean([digit.text == "?" for digit in number])
    return unread > 1 / 3 or evidence < (-1 if among_numbers else 0.75 if len(number) == 1 else 1)


def look_at_numbers(path: Path) -> Seen:
    """All candidates for digits in a picture; the picture, uint8 grey, how far it was shrunk, its lines."""
    grey, shrunk = read_picture(path)
    lines = find_lines(grey)
    images = [candidate.image for ways, _ in lines for _, candidates in ways for candidate in candidates]
    return np.reshape(images, (-1, 28, 28)).astype(np.uint8), (np.round(255 * grey).astype(np.uint8), shrunk, lines)


def tell_numbers(path: Path, seen: tuple, probabilities: np.ndarray, threshold: float) -> tuple[list, tuple]:
    """A row a number (path, line, number, confidence, left, top, width, height, digits); the picture and its marks."""
    grey, shrunk, lines = seen
    readings = zip(probabilities, digit_scores(probabilities) - threshold, strict=True)
    found = [(split_numbers(read_line(ways, readings)), place) for ways, place in lines]
    words = [is_word(number) for numbers, _ in found for number in numbers if len(number) > 1]
    among_numbers = len(words) > 2 and np.mean(words) <= 0.25  # then what is barely a number is hardly a word
    rows, marks, index = [], [], 0
    for numbers, place in found:
        numbers = [number for number in numbers if not is_word(number, among_numbers)]
        index += bool(numbers)  # lines without a number do not count
        for number in numbers:
            boxes = np.array([place(digit.box) for digit in number])
            corners = np.array([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
            text, sure = "".join(digit.text for digit in number), [digit.confidence for digit in number]
            first, last = np.round(corners * shrunk).astype(int)
            digits = " ".join(f"{each:.4f}" for each in sure)
            rows.append([printable(path), str(index), text, f"{math.prod(sure):.4f}", *first, *(last - first), digits])
            marks.append((text, corners, boxes[[digit.score < 0 for digit in number]]))
    return rows, (short_name(path), grey, marks)


# ---------------------------------------------------------------------------------------------------------------------
# Results: messages, signals, and the output folder: its lock, results that appear together, checkpoints, models, tables
STAGING, READY, CHECKPOINTS = ".staging", ".ready", ".checkpoint"  # hidden folders in the output folder
REPLACED = "replaced"  # in READY: the names of earlier files that have no successor there
CAPTIONS = {  # of the pictures, also in the README
    "confusion_matrix.png": "which digit is taken for which",
    "misclassified.png": "the mistakes, the most confident first",
    "calibration.png": 'whether "80% sure" is right in 80% of the cases',
    "predictions.png": "test images, and how probable the network finds each digit",
    "feature_maps.png": "what the layers of the network look at, and which test images they find alike",
    "training_curves.png": "loss, accuracy and learning rate over the epochs",
    "samples.png": "twelve training images of each digit",
    "pixels.png": "an image as numbers; grey has one channel, colour three",
    "augmentation.png": "the images that the network trains on in place of the original ones",
}
EXTERNAL, NUMBERS = "external_predictions.csv external_predictions.png".split(), "numbers.csv numbers.png".split()
TRAINED = "model.keras model.tflite history.csv training_curves.png samples.png pixels.png augmentation.png".split()
MEASURED = ["metrics.json", "predictions.csv", "report.html", *(name for name in CAPTIONS if name not in TRAINED)]
SUBMISSION = ["submission.csv"]
RESULTS = TRAINED + MEASURED + EXTERNAL + NUMBERS + SUBMISSION
RUN_COLUMNS = "finished_at seed data test_accuracy test_loss seconds exit_code".split()
MAX_MODEL_BYTES = 1 << 30
FOREIGN_CODE = ("Lambda", "TFSMLayer", "TorchModuleWrapper", "FlaxLayer", "JaxLayer", "__lambda__", "function")


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line at once, so that a log file can be followed."""
    try:
        print(line, file=stream, flush=True)
    except OSError:  # whoever read along has gone, or the log's disk is full: the run goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def warn(line: str) -> None:
    """Print one line to standard error, so that what is read by machines stays clean."""
    say(line.translate({10: "\\n", 13: "\\r"}), sys.stderr)


def prepare_streams() -> None:
    """Give a process that was started without them (`>&-`) its three streams, so that no file takes their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # what is opened next takes the lowest free number, which is this one's
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that the terminal cannot show ends no run
    # Libraries print what they like to number 2: that is lost, while Python and reports of aborts get another number.
    sys.stderr = open(os.dup(2), "w", errors="backslashreplace")  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faulthandler.enable(sys.stderr)
    logging.disable()


def describe(error: BaseException) -> str:
    """An exception in a few words on one line, for the end of a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [""])[0].strip()[:200] or type(error).__name__


@contextlib.contextmanager
def blame(what: object, advice: str) -> Iterator[None]:
    """Make a Failure of whatever is raised inside: libraries raise a dozen kinds of errors at a damaged file."""
    try:
        yield
    except Exception as error:
        raise Failure(f"{what}: {describe(error)}; {advice}") from error


def check_regular_file(path: Path) -> None:
    """Raise OSError or ValueError where there is no file with content; a pipe would be waited for without end."""
    if os.stat(path).st_size == 0 or not os.path.isfile(path):
        raise ValueError("the file is empty" if os.path.isfile(path) else "not a regular file")


@contextlib.contextmanager
def stop_on_signals(config: Config) -> Iterator[None]:
    """At the first SIGINT or SIGTERM, tidy the output folder and end the process; a second one ends it at once."""
    # An exception would not do: Python drops what is raised while it frees an object, as it often does among imports
    # and plots, and a C extension that is being loaded turns it into an error of its own.

    def stop(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        try:
            how = "; --resume continues after the last finished epoch" if config.job == "train" else ""
            warn(f"stopped by {signal.Signals(number).name}{how}")
            end_staging(config.output_dir)
        finally:
            os._exit(128 + number)  # without the seconds that TensorFlow takes to tear its pipeline down

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            signal.signal(number, stop if handler != signal.SIG_IGN else handler)  # background jobs ignore SIGINT
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the output folder and keep other runs out of it. Raises Failure where one holds it, or it is read-only."""
    lock = folder / ".lock"
    with blame(f"--output-dir {folder}", "give a folder that can be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    with open(descriptor):  # closing it gives up the lock
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = lock.read_text(errors="replace") or "another run"
            raise Failure(f"--output-dir {folder}: in use by {holder}; wait, or give another --output-dir") from error
        except (ImportError, OSError) as error:  # Windows, and some file systems
            warn(f"WARNING: --output-dir {folder}: no locks here ({describe(error)}); start one run at a time")
        lock.write_text(f"process {os.getpid()} on {platform.node()}")
        finish_publishing(folder)
        yield


@contextlib.contextmanager
def stage_results(folder: Path, replaces: Iterable[str]) -> Iterator[Path]:
    """An empty hidden folder to write results to; they are moved into `folder` together, once all are written."""
    # Earlier files named in `replaces` go then, even without a successor: no picture stands beside another run's model.
    staging = folder / STAGING
    try:
        for leftover in (staging, folder / READY):
            remove(leftover)
        staging.mkdir()
        yield staging
        (staging / REPLACED).write_text("\n".join(name for name in replaces if not (staging / name).exists()))
        flush_to_disk(*staging.iterdir(), staging)  # so that a power loss leaves all of them, or none
        os.rename(staging, folder / READY)
    finally:
        end_staging(folder)


def end_staging(folder: Path) -> None:
    """Remove results that are not all written yet, and move those that are into place."""
    with contextlib.suppress(OSError):
        remove(folder / STAGING)
    finish_publishing(folder)


def finish_publishing(folder: Path) -> None:
    """Move complete results into place, also those of a run that was stopped between two moves."""
    ready = folder / READY
    if ready.is_symlink() or not ready.is_dir():
        return
    with blame(f"--output-dir {folder}", f"complete results wait in {READY}, and the next run moves them into place"):
        replaced = ready / REPLACED  # stays until the end, so that all of this can be done again
        for name in replaced.read_text().split() if replaced.exists() else ():
            (folder / name).unlink(missing_ok=True)
        for file in set(ready.iterdir()) - {replaced}:
            os.replace(file, folder / file.name)  # replaces a symbolic link, never follows it
        flush_to_disk(folder)
        remove(ready)


def flush_to_disk(*paths: Path) -> None:
    """Wait until files, and what folders list, are on the disk itself, which a power loss does not empty."""
    for path in paths if os.name != "nt" else ():  # Windows flushes only what is open for writing, and no folders
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError if path.is_dir() else ()):  # some network file systems cannot flush folders
            os.fsync(descriptor)
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder and all in it, a file or a symbolic link, if there is one; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_checkpoints(config: Config, digits: Digits, log: Log) -> Path:
    """The folder of checkpoints, empty unless `--resume`. Raises Failure where that run had other flags or data."""
    folder = config.output_dir / CHECKPOINTS
    identity = {name: getattr(config, name) for name in WEIGHT_FLAGS} | {"data": digits.sha256}
    unfinished = read_json(folder / "run.json") if config.resume and not folder.is_symlink() else {}
    changed = [f"--{name.replace('_', '-')}" for name in identity if unfinished.get(name) != identity[name]]
    if unfinished and changed:
        raise Failure(f"--resume: {changed[0]} is not as in the run that was stopped; give it as before, or start over")
    if not unfinished:
        if config.resume:
            log("nothing to resume: training starts from the beginning")
        remove(folder)
        folder.mkdir()
        write_json(folder / "run.json", identity)
    return folder


def save_checkpoint(path: Path, model: keras.Model, history: list[Row], best_weights: list[np.ndarray]) -> None:
    """Keep all that the next epoch depends on, in one file, renamed into place once it is whole."""
    # Keras' own checkpoints leave out the state of dropout's random numbers, so that a resumed run would differ.
    variables = [variable.numpy() for variable in (*model.variables, *model.optimizer.variables)]
    temporary = path.with_suffix(".part.npz")
    temporary.unlink(missing_ok=True)  # never write through a link
    np.savez(temporary, np.array(json.dumps(history)), *variables, *best_weights)
    flush_to_disk(temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: keras.Model) -> tuple[list[Row], list[np.ndarray]]:
    """Put the state in `path`, if any, into a compiled model; return the history and the best weights so far."""
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    if not path.exists():
        return [], []
    try:
        with np.load(path, allow_pickle=False) as archive:
            text, *values = archive.values()
        history, best_weights = json.loads(str(text)), values[len(variables) :]
        places = [*variables, *(model.weights if best_weights else [])]
        if best_epoch(history) and [place.shape for place in places] != [value.shape for value in values]:
            raise ValueError("it belongs to another network")
    except Exception as error:  # zipfile, NumPy and json raise a dozen kinds at damaged files
        warn(f"WARNING: {path}: the checkpoint is damaged ({describe(error)}); this network is trained from the start")
        return [], []
    for variable, value in zip(variables, values, strict=False):  # the best weights come after them
        variable.assign(value)
    return history, best_weights


def load_model(path: Path) -> keras.Model:
    """Read a .keras file of Keras' own layers that takes (n, 28, 28, 1) and gives (n, 10), else raise Failure."""
    # Keras' safe mode and the check of the classes keep code of the file's own from running.
    with blame(path, "a training run writes one that fits"):
        check_regular_file(path)
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_MODEL_BYTES or archive.testzip():
                raise ValueError(f"damaged, or more than {MAX_MODEL_BYTES >> 20} MiB")
            layers = json.loads(archive.read("config.json")) | {"compile_config": None}  # no loss or metric is loaded
            json.loads(json.dumps(layers), object_hook=refuse_foreign_code)  # called for each part
        model = keras.models.load_model(path, compile=False, safe_mode=True)
        shapes = model.input_shape, model.output_shape
        if shapes != ((None, 28, 28, 1), (None, 10)):
            raise ValueError(f"takes {shapes[0]} and gives {shapes[1]}, not (None, 28, 28, 1) and (None, 10)")
    return model


def refuse_foreign_code(node: dict[str, Any]) -> None:
    """Raise ValueError where a part of a model's description asks for a class that is not Keras' own."""
    module, name = str(node.get("module")), str(node.get("class_name"))
    if name in FOREIGN_CODE or module.split(".")[0] not in ("None", "keras"):
        raise ValueError(f"uses {module}.{name}, which may run code of its own, so it is not loaded")


def metrics_of_model(model_file: Path) -> dict[str, Any]:
    """The metrics.json of the run that made this model; empty where none lies beside it."""
    beside = read_json(model_file.parent / "metrics.json")
    metrics = beside.get("training", beside)  # an evaluation keeps those of the run whose model lies in its folder
    checksum = hashlib.sha256(model_file.read_bytes()).hexdigest()
    return metrics if metrics.get("files", {}).get(model_file.name) == checksum else {}


def row_of_run(metrics: dict[str, Any]) -> list[str]:
    """The row of runs.csv that says how a run ended."""
    names = metrics["finished_at"], str(metrics["config"]["seed"]), metrics["dataset"]["name"]
    accuracy, loss, seconds = metrics["test_accuracy"], metrics["test_loss"], metrics["timings_seconds"]["total"]
    return [*names, f"{accuracy:.4f}", f"{loss:.5f}", f"{seconds:.1f}", str(metrics["exit_code"])]


def read_runs(folder: Path) -> list[list[str]]:
    """The rows of runs.csv but damaged ones, which must not cost a new run its results."""
    runs = []
    with contextlib.suppress(OSError, ValueError, csv.Error):
        check_regular_file(folder / "runs.csv")
        with open(folder / "runs.csv", newline="", encoding="utf-8", errors="replace") as stream:
            for row in csv.reader(stream):
                with contextlib.suppress(ValueError, IndexError):
                    sound = 2000 <= time.strptime(row[0], UTC).tm_year < 2100 and 0 <= float(row[3]) <= 1
                    runs += [row] if sound and len(row) == len(RUN_COLUMNS) else []
    return runs


def append_run(folder: Path, row: Sequence[str]) -> None:
    """Add one row to runs.csv, which is never rewritten. Raises Failure where that is impossible."""
    path = folder / "runs.csv"
    with blame(path, "the results themselves are in place"):
        if path.is_symlink():
            raise ValueError("is a symbolic link")
        content = path.read_bytes() if path.exists() else b""
        before = [] if content.endswith(b"\n") else [[]] if content else [RUN_COLUMNS]  # [[]]: ends a line cut short
        write_csv(path, [*before, row], mode="a")


def write_csv(path: Path, rows: Iterable[Iterable[Any]], mode: str = "w") -> None:
    with open(path, mode, newline="", encoding="utf-8", errors="backslashreplace") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Reports: a measured model -> what its layers look at; a model for phones; a page for the next morning
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; font: 16px/1.5 sans-serif }} .below {{ color: #d33 }}
body {{ max-width: 56rem; margin: auto; padding: 1rem }}
table {{ border-collapse: collapse; font-size: 0.9rem; display: block; overflow-x: auto }}
th, td {{ border-bottom: 1px solid #8886; padding: 0.2rem 1rem 0.2rem 0; text-align: left; vertical-align: top }}
td {{ overflow-wrap: anywhere }} th, td:first-child {{ white-space: nowrap }}
figure, table {{ margin: 2rem 0; break-inside: avoid }}
img {{ width: 100% }} @media print {{ img {{ width: auto; max-width: 100%; max-height: 23cm }} }}
</style></head><body>
{body}</body></html>
"""
RANK = 80  # of the widest layer in model.tflite, which is a sixth smaller for it and no less accurate
BLOCKS = {  # of the cnn: what the answers of a block's filters show, and how many pixels there are from one to the next
    "Block 1: where 24 of its filters found their pattern (orange), such as a stroke or an edge of one direction.": 2,
    "Block 2: where 24 of its filters found patterns of block 1 together, such as a corner or the end of a stroke.": 4,
    "Block 3: the same with patterns of block 2; each answer takes in 20 x 20 pixels, a large part of the digit.": 4,
}


def is_own(model: keras.Model) -> bool:
    """Whether a model is made of networks as `build_model` makes them, and of nothing else that is trained."""
    own = [[each.shape for each in build_model(name, 0.0, 0).weights] for name in ("cnn", "mlp")]
    return bool(model.weights) and [w.shape for w in model.weights] in [one * len(networks_of(model)) for one in own]


def write_feature_maps(path: Path, model: keras.Model, digits: Digits, evaluation: Evaluation) -> None:
    """Plot what the first network of a model of this program looks at, and a map of some of the test images."""
    network = networks_of(model)[0]
    last = keras.Model(network.inputs, network.get_layer("logits").input)
    some = np.union1d(np.arange(0, len(evaluation.labels), 5), np.flatnonzero(~evaluation.correct)[:100])
    hidden = last.predict(normalise(digits.test_images[some]), batch_size=500, verbose=0)
    image = digits.test_images[np.argmax(evaluation.labels == 2)]  # is shown, layer by layer
    # A block ends where the next convolution, or the flattening, begins; the first of these begins with the image.
    ends = [layer.input for layer in network.layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Flatten))]
    blocks = [keras.Model(network.inputs, end)(normalise(image[np.newaxis]))[0].numpy() for end in ends[1:]]
    kernel = network.get_weights()[0]  # (5, 5, 1, n) of a convolution; (784, n) of the mlp
    side = math.isqrt(kernel.size // kernel.shape[-1])
    filters, part = kernel.reshape(side, side, -1).transpose(2, 0, 1), Evaluation(*(each[some] for each in evaluation))
    plot_feature_maps(path, image, filters, blocks, hidden, part)


def plot_feature_maps(
    path: Path, image: np.ndarray, filters: np.ndarray, blocks: list[np.ndarray], hidden: np.ndarray, part: Evaluation
) -> None:
    """Filters, (n, side, side); what blocks answer to an image; a hidden layer's map of test images, (m, units)."""
    side, rows = filters.shape[1], dict(zip(BLOCKS, blocks, strict=False))
    first = f"{len(filters)} filters of {side} x {side} pixels: ink on white raises the answer, on black it lowers it."
    last = "Test images, where the last hidden layer puts them (PCA, two dimensions). Red circles: mistakes."
    heights = [1.3, *(2.0 for _ in rows), 6.5]
    height, title = 1.16 * sum(heights) + 1.2, "What the network has learnt to look at"
    subtitle = "Layer by layer, from pixels to ten groups of images. Of an ensemble: its first network."
    with new_figure(path, 12, height, title, subtitle) as figure:
        figure.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 1 - 0.95 / height))
        mosaic = [["image", *[first] * 8], *([row] * 9 for row in (*rows, last))]
        axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
        show_image(axes["image"], image)
        tiles = np.kron(filters / np.abs(filters).max((1, 2), keepdims=True), np.ones((1, 28 // side, 28 // side)))
        show_image(axes[first], 127.5 * (tiles + 1).reshape(2, -1, *tiles.shape[1:]))
        for row, answers in rows.items():
            show_image(axes[row], np.tile(image, (2, 12, 1, 1)))
            draw_answers(axes[row], answers, BLOCKS[row])
        draw_map(axes[last], hidden, part)
        for row in (first, *rows, last):
            axes[row].set_title(row, fontsize=11)


def draw_answers(axes: matplotlib.axes.Axes, answers: np.ndarray, cell: int) -> None:
    """Make a sheet of an image glow where the 24 strongest filters answer: (side, side, n), a cell of pixels each."""
    strongest = answers[..., np.sort(np.argsort(answers.max((0, 1)))[-24:])]
    shares = (strongest / np.maximum(strongest.max((0, 1)), 1e-9)).transpose(2, 0, 1)
    margin = (28 - cell * len(answers)) // 2
    shares = np.pad(np.kron(shares, np.ones((1, cell, cell))), [(0, 0), (margin, margin), (margin, margin)])
    glow = matplotlib.colors.LinearSegmentedColormap.from_list("glow", [ORANGE + "00", ORANGE])
    show_image(axes, 255 * shares.reshape(2, 12, 28, 28), colours=glow)


def draw_map(axes: matplotlib.axes.Axes, hidden: np.ndarray, evaluation: Evaluation) -> None:
    """A map of m images by the (m, units) answers of a layer, in the two directions in which they vary most (PCA)."""
    centred = hidden - hidden.mean(axis=0)
    places = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -2:]
    for digit in np.unique(evaluation.labels):
        own, colour = places[evaluation.labels == digit], matplotlib.colormaps["tab10"](digit)
        axes.scatter(*own.T, s=9, color=colour, alpha=0.6, linewidths=0)
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": colour, "linewidth": 2}
        axes.text(*np.median(own, axis=0), str(digit), fontsize=17, fontweight="bold", bbox=box, **IN_CELL)
    axes.scatter(*places[~evaluation.correct].T, s=60, facecolors="none", edgecolors=RED, linewidths=1.3)
    axes.set_axis_off()


def convert_to_tflite(model: keras.Model, images: np.ndarray) -> bytes:
    """A model, one look, with 8-bit integers inside: float32 (1, 28, 28, 1) -> (1, 10). Calibrated on uint8 images."""
    if is_own(model):
        model = build_ensemble([narrow(network, images) for network in networks_of(model)])
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[np.newaxis]] for image in normalise(images))
    # Softmax stays in float: in 8 bits, its smallest probability but 0 would be 1/256.
    options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=["SOFTMAX"])
    with contextlib.redirect_stdout(io.StringIO()):  # it lists all tensors
        quantiser = tf.lite.experimental.QuantizationDebugger(converter=converter, debug_options=options)
    return bytes(quantiser.get_nondebug_quantized_model())


def narrow(network: keras.Model, images: np.ndarray) -> keras.Model:
    """A network whose widest layer is replaced by two that keep what varies most over images (PCA)."""
    x = inputs = keras.Input((28, 28, 1))
    for layer in network.layers:
        if isinstance(layer, keras.layers.Dense) and layer.units > RANK:
            outputs = keras.Model(network.inputs, layer.output).predict(normalise(images), verbose=0)
            mean, vectors = outputs.mean(axis=0), np.linalg.eigh(np.cov(outputs.T))[1][:, -RANK:]
            down, up = keras.layers.Dense(RANK, use_bias=False), keras.layers.Dense(layer.units)
            x = up(down(x))
            down.set_weights([layer.get_weights()[0] @ vectors])
            up.set_weights([vectors.T, mean - mean @ vectors @ vectors.T])
        elif not isinstance(layer, (keras.layers.InputLayer, keras.layers.Softmax)):
            x = layer(x)
    return keras.Model(inputs, keras.layers.Softmax()(x))


def measure_tflite(content: bytes, digits: Digits) -> dict[str, float]:
    """How good a TensorFlow Lite model is on the test images, and its size."""
    classify = tf.lite.Interpreter(model_content=content).get_signature_runner()
    (entry,), (result,) = classify.get_input_details(), classify.get_output_details()
    outputs = [classify(**{entry: image[np.newaxis]})[result] for image in normalise(digits.test_images)]
    evaluation = Evaluation(digits.test_labels, np.concatenate(outputs).astype(np.float64))
    return {"accuracy": evaluation.correct.mean(), "loss": cross_entropy(evaluation), "bytes": len(content)}


def summarise(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run found, by topics, a line each, for its log and its report."""
    dataset, phone, memory = metrics["dataset"], metrics.get("tflite"), metrics["peak_rss_mib"]
    topics = {
        "accuracy": f"{metrics['test_accuracy']:.2%}: {metrics['test_errors']} errors",
        "loss": f"{metrics['test_loss']:.4f}; calibration error {metrics['expected_calibration_error']:.4f}",
        "tflite": "{accuracy:.2%}; loss {loss:.4f}; {bytes:,} bytes".format(**phone) if phone else "",
        "data": f"{dataset['title']}, from {dataset['origin']}",
        "finished": metrics["finished_at"],
        "seconds": ", ".join(f"{name} {took:.1f}" for name, took in metrics["timings_seconds"].items()),
        "memory": f"{memory} MiB at the most" if memory else "",
        "results": str(metrics["config"]["output_dir"].resolve()),
    }
    return [(topic, text) for topic, text in topics.items() if text]


def write_report(folder: Path, metrics: dict[str, Any], runs: Sequence[Sequence[str]]) -> None:
    """report.html: what a run found, its pictures in `folder` and the runs so far, on one page that loads nothing."""
    flags, usual, title = metrics["config"], vars(parse_config([])), html.escape(metrics["summary"])
    parts = [f"<h1{' class=below' * bool(metrics['exit_code'])}>{title}</h1>", html_table(summarise(metrics))]
    if flags["plots"]:
        picture = io.BytesIO()
        alike = [(run[0][:19], float(run[3])) for run in runs if run[2] == metrics["dataset"]["name"]]
        plot_runs(picture, *zip(*alike, strict=True), flags["min_accuracy"])
        parts += [html_picture(picture, "runs", "the runs in this folder on the same data; red: --min-accuracy")]
        parts += [html_picture(folder / name, name, CAPTIONS[name]) for name in CAPTIONS if (folder / name).exists()]
    measures = list(metrics["per_digit"][0])
    tables = {
        "Each digit": [measures, *([f"{row[each]:.4g}" for each in measures] for row in metrics["per_digit"])],
        "The last 20 runs in this folder": [RUN_COLUMNS, *runs[::-1][:20]],
        "Settings": [("not as without flags", "value"), *(pair for pair in flags.items() if pair not in usual.items())],
        "Versions": [("package", "version"), *metrics["versions"].items()],
    }
    parts += [f"<h2>{heading}</h2>{html_table(rows)}" for heading, rows in tables.items()]
    page = PAGE.format(title=title, body="\n".join(parts))
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def plot_runs(file: io.BytesIO, dates: Sequence[str], accuracies: Sequence[float], minimum: float | None) -> None:
    """The accuracies of runs by their dates (ISO 8601), and the smallest that is accepted."""
    days, percents = np.array(dates, "datetime64[s]"), 100 * np.array(accuracies)
    lowest, margin = min(percents.min(), 100 * (minimum or 1)), max(np.timedelta64(12, "h"), np.ptp(days) // 50)
    with new_figure(file, 9, 3.4, "Accuracy over time", "Each dot is a run.") as figure:
        axes = figure.add_subplot(ylabel="% of the test images")
        axes.plot(days, percents, "o-", color=BLUE, markersize=4)
        if minimum is not None:
            axes.axhline(100 * minimum, color=RED)
        axes.set(xlim=(days.min() - margin, days.max() + margin), ylim=(1.1 * lowest - 10.05, 100.05))
        axes.xaxis.set_major_formatter(matplotlib.dates.ConciseDateFormatter(axes.xaxis.get_major_locator()))
        axes.grid(alpha=0.25)


def html_table(rows: Iterable[Iterable[object]]) -> str:
    """A table in HTML, whose first row is its header; all text is escaped."""
    texts = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = ["".join(f"<th>{text}</th>" for text in texts[0])]
    lines += ["".join(f"<td>{text}</td>" for text in line) for line in texts[1:]]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def html_picture(file: Path | io.BytesIO, name: str, caption: str) -> str:
    """A PNG inside a page, with a caption; in fewer colours, for a page that is small enough for a mail."""
    content = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(content, "PNG")
    source = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{name}: {text}</figcaption></figure>'


# ---------------------------------------------------------------------------------------------------------------------
# Main: the jobs. Training, --combine and --evaluate go the same way and differ in one step: where the model comes from.
Made = tuple[Any, Split | None, dict[str, Any]]  # by a job: a keras.Model, what to calibrate it on, what to say of it
# How --predict and --read look at a picture and tell what it shows; files; columns; those printed; plot; most pictures.
RECOGNISERS = {
    "predict": (look_at_digit, tell_digit, EXTERNAL, DIGIT_COLUMNS, "0124", plot_cards, MAX_CARDS),
    "read": (look_at_numbers, tell_numbers, NUMBERS, NUMBER_COLUMNS, "0123", plot_numbers, 12),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program: returns its exit code."""
    config = parse_config(arguments)
    try:
        with hold_folder(config.output_dir), stop_on_signals(config), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries warn of either fails as well, or concerns no user,
            warnings.filterwarnings("error", r"loadtxt\(\)")  # but for this: NumPy 1 makes a 44 of a pixel of 300
            return {"predict": recognise, "read": recognise, "submit": submit}.get(config.job, run_job)(config)
    except Failure as failure:
        warn(f"error: {failure}")
    except OSError as error:
        warn(f"error: {describe(error)} ({error.filename or 'while writing'}); {config.output_dir} is as it was")
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":  # TensorFlow's
            raise
        warn("error: out of memory; give a smaller --batch-size or --train-limit")
    return EXIT_FAILED


def run_job(config: Config) -> int:
    """Make or load a model, measure it on the test images, publish and report the results. Returns the exit code."""
    started, seconds = time.time(), {}
    log = (lambda line: None) if config.quiet else say
    job = {"train": train, "combine": combine, "evaluate": evaluate}[config.job]
    with stage_results(config.output_dir, MEASURED if job is evaluate else RESULTS) as results:
        with timed(seconds, "startup"):
            importlib.import_module("tensorflow")
        with timed(seconds, "data"):
            digits = load_digits(config.data)
            earlier = read_json(config.output_dir / "metrics.json").get("dataset", {}).get("name", digits.name)
            if config.data == "auto" and digits.name == "synthetic" and earlier != "synthetic":
                raise Failure(f"{config.output_dir} holds results on {earlier}; give another --output-dir, or --data")
        model, split, about = job(config, digits, results, seconds, log)
        with timed(seconds, "evaluation"):
            about |= calibrate_and_save(model, split, results) if split else {}
            evaluation = Evaluation(digits.test_labels, predict_probabilities(model, digits.test_images))
        with timed(seconds, "plots"):
            write_evaluation(results, digits, evaluation, config)
            if config.plots and is_own(model):
                write_feature_maps(results / "feature_maps.png", model, digits, evaluation)
        if config.tflite:
            with timed(seconds, "tflite"), blame("--tflite", "leave it out; --resume completes a training run"):
                content = convert_to_tflite(model, digits.train_images[:1000])
                (results / "model.tflite").write_bytes(content)
                about["tflite"] = measure_tflite(content, digits)
        moments = {"started_at": started, "finished_at": time.time()}
        about |= {name: time.strftime(UTC, time.gmtime(moment)) for name, moment in moments.items()}
        about["timings_seconds"] = seconds | {"total": round(moments["finished_at"] - started, 3)}
        metrics = describe_run(config, digits, model, evaluation) | about
        runs = [*read_runs(config.output_dir), row_of_run(metrics)]
        write_report(results, metrics, runs)
        checksums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(results.iterdir())}
        write_json(results / "metrics.json", metrics | {"files": about.get("files", {}) | checksums})
    if job is train:
        shutil.rmtree(config.output_dir / CHECKPOINTS, ignore_errors=True)
    log("\n" + "\n".join(f"{topic:<12} {text}" for topic, text in summarise(metrics)))
    say(metrics["summary"])
    append_run(config.output_dir, runs[-1])
    return metrics["exit_code"]


def train(config: Config, digits: Digits, results: Path, seconds: dict[str, float], log: Log) -> Made:
    """Train `--members` networks, each calibrated where they are several, and join them."""
    split = split_validation(digits, config.validation_split, config.train_limit)
    log(f"{digits.title}: {len(split.x_train):,} images to train on, {len(split.x_validation):,} to validate on")
    checkpoints = open_checkpoints(config, digits, log)
    models, history = [], []
    with timed(seconds, "training"), ThreadPoolExecutor(1) as beside:
        drawing = beside.submit(write_data_plots, results, split, config, digits.title) if config.plots else None
        for seed in range(config.seed, config.seed + config.members):
            with strategy_scope(config.strategy):
                model = build_model(config.model, config.dropout, seed)
                history += train_model(model, split, digits.name, config, seed, checkpoints / f"seed{seed}.npz", log)
            model = keras.Model(model.inputs, model.outputs, name=model.name)  # without optimizer and strategy
            models.append(add_test_time_augmentation(model) if config.model == "cnn" else model)
            if config.members > 1:
                calibrate(models[-1], split.x_validation, split.y_validation)
    with timed(seconds, "plots"):
        write_csv(results / "history.csv", [history[0], *(row.values() for row in history)])
        if drawing:
            drawing.result()
            plot_training_curves(results / "training_curves.png", history, digits.title)
    speed = sum(row["images"] for row in history) / sum(row["seconds"] for row in history)
    model = models[0] if config.members == 1 else build_ensemble(models)
    return model, split, {"training_images_per_second": speed}


def combine(config: Config, digits: Digits, results: Path, seconds: dict[str, float], log: Log) -> Made:
    """Join models into an ensemble, calibrated on images that no member with a metrics.json was trained on."""
    split = split_validation(digits, config.validation_split, config.train_limit)
    members = []
    for folder in config.combine:
        members.append(load_model(folder / "model.keras"))
        if not isinstance(members[-1].layers[-1], keras.layers.Softmax) or not networks_of(members[-1]):
            raise Failure(f"--combine {folder}: its model was not made by this program")
        trained_on = metrics_of_model(folder / "model.keras")
        if trained_on and trained_on["dataset"]["sha256"] != digits.sha256:
            raise Failure(f"--combine {folder}: was trained on other data; name the data of all members with --data")
        flags = [trained_on["config"][name] for name in ("validation_split", "train_limit")] if trained_on else []
        if flags and len(split_validation(digits, *flags).x_train) > len(split.x_train):
            advice = f"--validation-split {flags[0]:g} --train-limit {flags[1] or len(digits.train_images)}"
            raise Failure(f"--combine {folder}: was trained on images that this run calibrates on; give {advice}")
    return build_ensemble(members), split, {"members": [str(folder) for folder in config.combine]}


def evaluate(config: Config, digits: Digits, results: Path, seconds: dict[str, float], log: Log) -> Made:
    """Load a saved model. What is known of the run whose results lie in the folder is kept under "training"."""
    model, own = load_model(config.model_file), metrics_of_model(config.model_file)
    here = read_json(config.output_dir / "metrics.json")
    keys = ("validation_accuracy", "validation_loss", "temperature", "rejection_threshold")
    files = {name: checksum for name, checksum in here.get("files", {}).items() if name not in MEASURED}
    return model, None, {key: own.get(key) for key in keys} | {"training": here.get("training", here), "files": files}


def recognise(config: Config) -> int:
    """Recognise pictures, or read the numbers in them; print and write what was found. Returns the exit code."""
    look, tell, (table, sheet), columns, printed, plot, most = RECOGNISERS[config.job]
    nothing = ["unreadable" if column == "verdict" else "" for column in columns[1:]]
    paths = list_pictures(config.read or config.predict, f"--{config.job}")
    with stage_results(config.output_dir, (table, sheet)) as results:
        model = load_model(config.model_file)
        threshold = metrics_of_model(config.model_file).get("rejection_threshold")
        if threshold is None:
            threshold = USUAL_THRESHOLD
            warn(f"WARNING: {config.model_file}: no metrics.json of its run beside it; threshold {threshold} is taken")
        rows, shown, unreadable, several = [columns], [], False, 0
        progress = sys.stderr.isatty() and not sys.stdout.isatty() and not config.quiet
        # The many small arrays of a line only make threads wait for each other; decoding and finding ink gain by two.
        threads = 2 if look is look_at_digit else 1
        for path, seen, probabilities in look_at_files(model, paths, look, threads, progress):
            if isinstance(seen, Failure):
                warn(f"error: {seen}")
                found, unreadable = [], True
            else:
                found, picture = tell(path, seen, probabilities, threshold)
                several += look is look_at_digit and shows_several(*seen)
                shown = [*shown, picture][:most]
            for row in found or [[printable(path), *nothing]]:
                say("\t".join(row[int(column)] for column in printed))
                rows.append(row)
        if several:
            warn(f"{several} of the pictures seem to show several digits: --read reads them all")
        write_csv(results / table, rows)
        if config.plots:
            plot(results / sheet, shown)
    return EXIT_FAILED if unreadable else EXIT_DONE


def submit(config: Config) -> int:
    """Recognise the rows of a CSV file, and write what Kaggle takes. Returns the exit code."""
    with stage_results(config.output_dir, SUBMISSION) as results:
        rows = read_csv(config.predict[0])
        if rows.shape[1] != 784:
            raise Failure(f"--predict {config.predict[0]}: has labels, or an index, before the 784 pixels of each row")
        digits = predict_probabilities(load_model(config.model_file), rows.reshape(-1, 28, 28)).argmax(axis=1)
        write_csv(results / SUBMISSION[0], [["ImageId", "Label"], *enumerate(digits, start=1)])
    say(f"{len(digits):,} digits recognised, in {config.output_dir / SUBMISSION[0]}")
    return EXIT_DONE


def calibrate_and_save(model: keras.Model, split: Split, results: Path) -> dict[str, Any]:
    """Calibrate a model on the validation images, and write it. Returns what metrics.json says of that."""
    temperature, validation = calibrate(model, split.x_validation, split.y_validation)
    model.save(results / "model.keras")
    return {
        "validation_accuracy": validation.correct.mean(),
        "validation_loss": cross_entropy(validation),
        "temperature": temperature,
        "rejection_threshold": np.quantile(digit_scores(validation.probabilities), 1 - ACCEPTED_SHARE),
    }


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add up in `seconds` how long a stage takes."""
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - start, 3)


def write_data_plots(folder: Path, split: Split, config: Config, dataset: str) -> None:
    """The pictures that need no trained model."""
    images, labels = split[:2]
    plot_samples(folder / "samples.png", images, labels, dataset)
    plot_pixels(folder / "pixels.png", images[0], labels[0])
    firsts = images[np.unique(labels, return_index=True)[1]]
    batch = tf.constant(normalise(np.tile(firsts, (12, 1, 1))))
    variants = 255 * augmentation(config)(batch, tf.constant([config.seed, 0])).numpy()
    variants = variants.reshape(12, -1, 28, 28).swapaxes(0, 1).astype(np.uint8)
    plot_augmentation(folder / "augmentation.png", firsts, variants, config.augment)


def write_evaluation(folder: Path, digits: Digits, evaluation: Evaluation, config: Config) -> None:
    """predictions.csv and the pictures that show how good a model is."""
    labels, images, wrong = evaluation.labels, digits.test_images, np.flatnonzero(~evaluation.correct)
    columns = range(len(labels)), labels, evaluation.predictions, (f"{value:.6f}" for value in evaluation.confidences)
    write_csv(folder / "predictions.csv", [["index", "label", "prediction", "confidence"], *zip(*columns, strict=True)])
    if not config.plots:
        return
    title = f"{digits.title}, {len(labels):,} test images: {evaluation.correct.mean():.2%} right, {len(wrong):,} errors"
    plot_confusion_matrix(folder / "confusion_matrix.png", evaluation, title)
    plot_calibration(folder / "calibration.png", evaluation, title)
    bars = "How probable the network finds each digit. Blue: the label. Orange: another digit."
    firsts = np.concatenate([np.flatnonzero(labels == digit)[:2] for digit in range(10)])
    plot_cards(folder / "predictions.png", cards_of(images, evaluation, firsts), title, f"Test images. {bars}")
    worst = wrong[np.argsort(-evaluation.confidences[wrong])][:MAX_CARDS]
    subtitle = f"Mistakes, the most confident first: {len(worst)} of {len(wrong):,}. {bars}"
    plot_cards(folder / "misclassified.png", cards_of(images, evaluation, worst), title, subtitle)


def describe_run(config: Config, digits: Digits, model: keras.Model, evaluation: Evaluation) -> dict[str, Any]:
    """How good the model is, and on which data, under which flags and versions and in how much memory it ran."""
    packages = {module.__name__: module.__version__ for module in (tf, keras, np, matplotlib)}
    sizes = {"training_images": len(digits.train_images), "test_images": len(digits.test_images)}
    matrix, accuracy = confusion_matrix(evaluation), evaluation.correct.mean()
    summary = f"{accuracy:.2%} of {len(digits.test_images):,} {digits.title} test images are right"
    below = config.min_accuracy is not None and accuracy < config.min_accuracy
    return {
        "summary": summary + (f": BELOW the --min-accuracy of {100 * config.min_accuracy:g}%" if below else ""),
        "exit_code": EXIT_BELOW_MINIMUM if below else EXIT_DONE,
        "test_accuracy": accuracy,
        "test_loss": cross_entropy(evaluation),
        "test_errors": int((~evaluation.correct).sum()),
        "expected_calibration_error": expected_calibration_error(evaluation),
        "confusion_matrix": matrix.tolist(),
        "per_digit": per_digit(matrix),
        "parameters": model.count_params(),
        "dataset": {key: getattr(digits, key) for key in ("name", "title", "origin", "sha256")} | sizes,
        "config": vars(config),
        "versions": {"mnist_digit_recognizer": VERSION, "python": platform.python_version()} | packages,
        "peak_rss_mib": peak_rss_mib(),
    }


def peak_rss_mib() -> int | None:
    """The most memory that this process has held, in MiB, which macOS counts in bytes; None where none is counted."""
    with contextlib.suppress(ImportError):  # Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: the strokes of which digits and non-digits are drawn
# A label has ways to write a digit, or letters that no hand writes like one (no O, I, S, Z, B, b, g, q or G), or other
# marks that people draw, separated by " | ". A way is strokes, separated by " / ". A stroke is points x,y in a box of
# 100 x 100 (x to the right, y down) through which the pen runs in a smooth curve. A sharp corner, " > ", ends one
# stroke and starts the next. Odd habits are here on purpose: networks trained on neater digits get them wrong.
STROKES = """
0: 50,0 20,14 10,50 24,86 50,100 76,86 90,50 80,14 50,0 | 60,0 34,18 12,54 24,90 52,98 80,78 86,44 68,18 44,16 | 56,2
24,16 10,54 24,92 52,98 82,76 90,40 72,8 44,4 | 66,4 34,6 12,40 14,78 38,98 66,90 88,56 86,20 60,2 | 30,12 12,40 12,74
36,98 68,94 90,66 88,28 62,5 | 76,2 40,16 14,54 12,86 34,98 66,80 90,40 84,10 60,6 | 58,0 28,18 10,56 24,92 54,98 82,74
86,40 64,20 42,26 | 78,8 54,0 24,16 8,54 18,88 46,98 78,78 92,40 82,12 64,2 | 36,14 14,36 10,66 30,96 60,96 84,72 90,36
72,6 38,2 24,24 | 76,0 46,10 14,40 14,78 40,98 72,84 88,52 78,22 50,14 30,22 | 72,20 44,2 14,28 8,62 34,97 68,90 88,56
80,18 52,3 44,16 | 50,0 48,10 22,24 10,56 28,92 56,98 84,76 88,40 70,16 46,10 | 76,12 44,2 16,30 8,70 30,98 60,90 84,58
90,24 70,4 50,20 | 50,0 20,14 10,50 24,86 50,100 76,86 90,50 80,14 50,0 / 84,6 50,50 16,94 | 36,4 16,36 14,76 42,100
74,82 86,46 78,10 | 70,4 36,14 12,50 20,88 52,98 84,74 92,42 84,20 | 60,10 28,20 10,56 26,94 60,96 84,64 78,26 52,10
92,0
1: 50,0 50,50 50,100 | 38,20 46,13 54,0 > 54,50 54,100 | 30,22 42,14 54,0 > 54,50 54,100 / 18,100 54,99 88,100 | 60,0
50,50 40,100 | 16,42 38,24 60,0 > 60,50 60,100 | 14,36 36,22 56,0 > 56,50 56,100 / 26,100 56,99 86,100 | 74,0 50,48
26,100 | 53,0 47,50 50,100 | 44,0 52,50 46,100
2: 15,25 25,7 50,0 75,8 82,28 70,50 40,78 12,98 > 50,97 90,96 | 22,24 36,4 52,10 50,46 36,94 > 60,95 88,92 | 10,20 28,4
56,2 76,20 66,48 38,76 8,94 > 34,88 62,98 96,90 | 18,30 24,8 54,0 76,16 72,44 50,72 22,96 > 54,94 84,100 | 12,14 40,4
76,8 78,24 50,56 10,96 > 50,98 98,92 | 30,20 44,6 58,4 50,40 34,80 20,96 6,92 16,80 50,84 100,82 | 40,14 52,2 62,14
46,56 30,92 12,94 14,84 50,86 96,92 | 14,30 40,8 70,14 68,40 46,66 22,84 6,82 8,70 28,72 60,86 98,76 | 12,30 30,6 62,4
76,24 60,50 36,72 12,80 4,68 22,58 46,66 68,84 84,100 | 20,16 46,0 74,14 74,48 48,76 18,76 6,62 24,50 56,62 80,80 88,100
| 52,24 30,30 18,16 36,2 64,6 70,30 56,64 28,92 8,94 16,80 50,88 92,92 | 15,22 30,5 55,0 80,15 78,40 55,70 25,93 12,90
20,75 42,82 65,95 92,92 | 20,20 45,0 75,10 75,40 50,70 20,95 10,85 25,75 50,90 95,100 | 8,26 34,3 66,4 76,26 62,58 34,88
8,94 4,78 24,68 48,78 70,92 100,84 | 22,26 36,4 60,2 76,22 70,54 44,86 16,98 0,88 8,68 34,66 58,80 78,92 100,86 | 16,22
40,0 68,6 76,34 64,70 38,96 10,94 4,74 26,58 54,66 76,86 98,92 | 30,26 22,12 40,0 64,6 70,28 54,62 24,94 10,90 26,82
60,94 96,98 | 14,16 46,0 70,14 64,50 40,86 18,98 10,84 28,72 56,70 98,62 | 16,22 40,2 68,12 66,50 58,86 > 8,96 50,92
96,88
3: 15,12 40,0 70,5 78,25 60,42 38,47 > 70,52 85,72 70,93 40,100 12,90 | 14,20 34,2 64,4 72,22 56,40 34,48 > 62,50 78,66
68,90 38,100 4,92 | 20,10 50,0 78,12 70,35 50,45 48,48 75,55 82,78 60,98 30,100 10,88 | 12,14 48,0 80,10 68,32 40,48
34,42 52,42 78,56 78,82 44,100 2,90 | 12,6 45,5 80,4 > 62,24 40,44 > 70,47 84,68 70,94 40,100 12,92 | 16,8 48,0 76,14
62,38 36,50 62,46 76,60 62,84 30,100 0,98 | 12,10 44,0 68,14 40,44 70,54 74,76 40,92 2,92 40,88 92,86 | 10,16 40,0 74,6
70,28 46,46 > 66,54 72,68 56,88 18,100 | 24,2 60,2 60,24 36,40 > 70,44 78,70 54,94 8,100 | 8,26 30,2 66,2 74,22 48,44
76,52 90,74 66,98 26,100 12,80 24,74 | 10,10 40,2 66,14 42,42 > 74,50 80,70 54,92 > 34,94 0,92 | 10,20 34,0 62,8 60,30
40,42 > 80,40 94,62 76,90 36,100 4,84 | 20,16 46,0 72,8 64,30 40,44 > 66,44 86,62 90,98 | 16,10 48,2 70,14 44,44 74,58
80,86 44,98 18,82 40,66 64,62
4: 20,5 17,30 15,55 > 50,55 88,50 / 78,2 74,50 70,100 | 70,2 35,30 10,55 > 40,56 80,50 / 72,2 68,50 62,100 | 20,2 14,30
22,50 50,52 75,42 / 82,2 76,42 68,100 | 16,4 8,34 18,56 46,56 76,40 / 78,0 76,40 66,66 58,100 | 10,10 6,34 12,48 40,50
68,40 84,8 > 74,44 66,100 | 24,4 10,38 8,56 > 48,54 98,46 / 62,26 56,60 46,100 | 30,0 18,30 8,58 > 50,56 92,58 / 58,34
57,60 56,100 | 20,0 12,30 4,62 > 50,64 100,60 / 74,4 70,50 66,100 | 65,0 40,33 8,66 > 50,66 95,64 / 65,0 66,50 66,100
5: 85,2 50,3 25,4 > 22,25 18,45 > 45,38 75,50 82,75 60,95 35,100 10,90 | 90,0 60,3 35,8 27,30 30,42 60,50 75,68 65,90
40,100 10,95 | 84,6 56,2 34,14 30,34 52,46 70,62 64,88 38,100 14,88 | 34,18 26,46 > 56,46 64,66 46,92 4,98 / 34,18 64,10
100,0 | 30,5 25,25 20,42 > 50,40 78,58 75,82 50,98 15,92 / 30,5 60,5 98,0 | 26,12 24,28 18,46 > 46,40 74,54 72,82 44,100
10,90 / 34,4 64,2 92,3 | 44,10 32,40 > 56,50 56,74 34,96 2,94 / 44,10 70,8 100,2 | 80,4 30,6 > 28,44 > 64,42 80,66 66,94
30,100 12,84 26,74 | 90,4 58,6 32,8 > 26,40 > 66,38 82,66 62,96 26,98 12,78 | 28,14 24,40 > 60,34 82,60 64,92 28,98
14,78 26,56 / 30,12 60,8 88,4 | 36,8 30,40 > 58,44 64,70 40,98 14,92 14,72 30,60 / 36,8 66,8 100,4 | 22,10 16,46 > 46,34
80,48 78,80 46,98 14,88 10,70 / 24,10 60,8 96,6 | 98,2 64,6 36,12 > 28,44 50,52 62,70 46,94 16,100 0,84 | 76,0 30,8
24,40 > 60,46 84,66 86,100 | 80,10 40,4 24,24 60,50 70,80 40,100 16,84 40,60
6: 70,0 40,20 20,50 17,78 35,98 65,95 80,75 65,57 40,60 20,78 | 55,0 30,30 18,65 30,93 55,98 75,82 70,62 48,56 22,72 |
44,0 20,34 10,66 22,94 54,100 84,84 86,58 64,44 36,56 14,84 | 85,5 55,8 28,35 15,70 35,97 68,93 78,72 60,58 30,66 20,75
| 60,0 26,26 6,62 18,94 50,98 88,78 98,58 80,48 52,62 40,88 | 34,0 20,30 14,62 22,92 52,100 80,84 80,62 58,52 34,62
26,86 | 40,0 26,36 20,70 24,98 52,96 74,80 70,64 50,70 38,92 | 66,0 40,24 22,56 24,86 46,100 66,88 66,68 48,64 30,80
26,94 | 42,2 18,40 10,80 30,99 64,92 84,66 80,48 70,52 | 72,2 36,28 14,68 22,96 44,98 66,76 74,56 58,50 32,70 8,86 |
78,16 66,2 38,12 16,44 14,78 40,98 74,90 80,66 56,54 22,66 | 46,0 26,34 12,72 16,92 44,96 76,82 90,62 76,54 56,68 46,90
| 60,0 34,28 14,64 12,90 30,98 58,84 76,62 72,52 50,60 24,84 | 40,0 22,36 10,70 26,96 60,86 92,60 60,54 30,74 | 30,0
18,40 16,80 > 50,98 80,72 58,58 22,84
7: 10,8 45,6 85,4 > 62,45 42,100 | 6,8 40,8 76,6 > 52,40 40,72 44,98 | 8,6 44,8 80,4 > 52,42 40,80 48,98 | 8,4 40,5 76,2
> 70,48 66,100 | 8,12 40,2 75,5 82,20 65,55 55,100 | 6,10 40,8 78,2 > 58,40 38,78 38,90 48,97 | 6,12 40,6 88,0 > 50,48
10,100 | 8,30 16,4 40,4 72,10 > 60,52 44,100 | 8,18 26,2 50,10 80,2 64,44 48,100 | 10,25 13,8 > 50,8 85,3 75,30 55,65
45,100 | 6,22 10,6 > 46,8 84,4 > 58,50 44,100 / 24,56 56,50 88,50 | 14,34 10,10 > 46,12 80,2 > 66,50 60,100 | 6,14 40,8
80,6 > 46,44 34,72 40,100 | 10,12 44,10 84,4 > 56,36 42,70 38,100 | 12,36 18,6 > 50,10 86,0 > 60,44 48,100 | 10,10 45,6
85,4 > 62,45 42,100 / 30,52 55,50 82,48 | 12,12 50,8 86,0 > 60,44 46,100 / 12,62 50,52 96,40 | 10,10 45,6 85,4 > 60,48
44,100 / 22,74 54,70 84,64 | 6,40 16,12 > 50,20 86,8 > 60,50 44,100 / 26,62 54,54 88,52 | 14,26 36,4 64,2 78,20 66,44
52,66 50,100
8: 75,12 50,0 25,12 28,32 50,47 75,65 80,85 50,100 20,86 27,65 50,48 75,30 75,12 | 80,10 45,2 25,20 50,45 72,68 60,95
30,97 25,72 55,45 85,15 | 24,98 34,70 62,40 70,14 50,0 30,10 36,38 62,68 72,98 | 50,47 22,30 30,5 65,2 78,22 50,47 20,72
30,98 65,98 80,72 50,47 | 92,6 70,20 46,46 22,74 24,96 50,98 64,78 48,54 28,34 30,12 54,0 72,8 | 64,8 38,2 24,22 44,42
66,60 64,90 36,100 20,82 40,58 66,36 94,12 | 72,4 34,2 20,20 44,38 56,54 50,88 24,100 16,80 38,54 98,8 | 50,0 26,10
26,36 50,46 74,36 74,10 50,0 / 50,46 20,58 20,88 50,100 80,88 80,58 50,46 | 54,0 30,4 26,22 48,30 70,20 70,6 54,0 /
46,32 16,48 16,86 44,100 76,86 78,50 46,32 | 74,34 84,10 54,0 18,12 20,42 48,62 64,78 58,96 40,98 34,82 52,62 74,34 |
22,8 34,44 58,66 66,90 46,100 30,88 42,62 66,36 76,6 | 80,18 56,0 28,10 34,34 66,56 74,84 48,100 24,88 30,66 54,50
9: 78,20 55,2 25,12 18,35 40,50 68,38 78,18 > 76,50 70,100 | 84,6 54,4 24,26 24,44 44,46 72,26 / 84,6 68,52 48,100 |
75,12 45,2 20,20 28,45 55,45 75,20 76,15 74,50 62,85 35,100 | 56,2 30,10 16,32 26,48 50,42 84,16 > 70,56 58,100 | 80,8
50,2 22,18 25,42 52,44 78,20 72,55 55,100 | 78,22 50,0 16,14 12,42 40,54 72,38 80,14 84,58 68,94 40,100 16,88 | 76,4
40,2 10,24 18,44 46,42 78,14 > 70,56 62,100 | 84,12 50,0 14,20 6,52 24,66 58,50 82,14 > 82,56 86,100 | 70,20 56,0 30,6
20,30 36,46 60,36 70,14 74,48 66,100 | 66,14 48,0 30,10 28,28 44,34 62,22 66,8 62,50 56,100 | 86,20 60,4 24,14 10,42
30,56 62,46 84,22 76,58 66,100 | 74,4 40,4 18,14 20,40 48,44 76,34 / 74,4 76,50 74,100 | 90,8 56,0 26,22 30,42 60,40
82,22 66,60 40,100 | 82,6 52,0 30,10 28,26 52,34 72,28 80,14 70,58 52,100 | 64,2 34,10 18,34 34,50 62,38 76,16 / 80,6
74,50 64,100 | 92,2 56,8 22,24 20,44 44,48 72,30 84,14 > 72,54 60,100 | 62,6 36,6 14,26 16,46 42,46 70,24 86,6 > 72,50
62,100 | 70,10 44,4 18,20 14,42 40,48 70,30 / 74,6 70,50 60,100 | 68,8 36,4 14,24 20,44 46,44 72,24 / 80,8 74,50 62,100
| 84,8 52,0 26,14 30,34 58,40 78,22 > 72,60 40,96 | 62,6 40,4 24,20 26,40 46,44 72,22 > 66,60 54,100 | 74,14 46,2 18,20
14,42 36,48 66,34 / 84,0 76,50 70,100 | 78,4 44,4 22,24 30,42 56,38 76,24 66,60 50,100
letter: 5,100 28,50 50,0 > 72,50 95,100 / 22,65 78,65 | 20,0 20,50 20,100 / 80,38 50,56 20,72 / 38,62 60,80 84,100 |
78,30 45,12 15,40 20,85 52,90 78,50 / 80,10 78,60 84,90 100,92 | 18,0 18,50 18,100 / 18,2 62,0 88,24 62,50 18,52 | 20,24
48,4 74,24 76,96 / 74,46 28,52 16,76 40,96 74,76 | 78,58 48,42 16,66 30,98 62,92 78,66 / 80,0 79,50 82,100 | 88,20 60,2
25,15 8,50 25,87 60,98 90,80 | 60,24 60,70 50,96 20,92 / 58,0 60,2 62,4 | 90,30 52,8 12,50 50,94 94,72 | 15,0 14,50
15,100 > 50,99 85,100 | 8,0 8,50 20,92 50,100 80,92 92,50 92,0 | 15,0 15,50 15,100 / 0,0 50,2 95,30 95,68 50,98 0,100 |
12,0 12,50 12,100 / 88,0 88,50 88,100 / 12,50 50,49 88,50 | 15,0 14,50 15,100 / 15,0 50,2 88,0 / 15,48 45,47 75,48 /
15,100 50,98 90,100 | 5,0 50,1 95,0 / 50,0 50,50 50,100 | 86,12 46,0 22,24 52,46 14,66 30,98 90,90 | 18,0 18,50 18,100 /
18,2 62,0 86,24 62,48 18,50 / 44,50 64,74 90,100 | 12,52 50,54 88,46 74,14 40,6 12,40 22,84 56,98 92,80 | 15,0 15,50
15,100 / 88,2 52,30 15,58 / 38,42 62,70 92,100 | 18,0 17,50 18,100 / 18,0 52,1 90,0 / 18,46 48,46 76,46 | 8,0 28,25
50,48 / 92,0 70,25 50,48 > 50,75 50,100 | 84,10 62,0 46,20 44,60 42,100 / 14,44 45,42 80,40 | 10,100 10,50 12,0 > 50,50
88,100 > 89,50 90,0 | 20,0 20,50 20,100 / 20,64 46,42 72,52 76,100 | 6,10 8,50 8,96 / 8,40 26,12 46,24 48,96 / 48,40
68,12 90,24 92,96 | 40,0 70,0 100,0 / 70,0 70,60 56,96 24,98 6,72 | 12,10 12,60 34,92 66,80 84,50 / 86,10 85,50 96,94 |
8,100 10,50 12,0 > 30,35 50,68 > 70,35 88,0 > 90,50 92,100 | 14,10 16,50 16,96 / 16,42 44,10 78,22 84,96 | 48,0 46,50
52,92 84,90 / 12,30 48,29 86,28 | 50,2 20,15 10,50 25,84 50,92 75,84 90,50 78,13 50,2 / 58,62 78,82 100,104 | 8,0 28,50
50,100 > 72,50 92,0 | 22,10 24,50 24,96 / 24,48 44,18 84,14 | 4,4 8,70 30,98 50,40 70,98 92,70 96,4 | 2,0 26,100 > 50,20
> 74,100 > 98,0 | 12,4 16,36 46,44 80,24 / 86,2 84,60 66,94 30,100 12,84 | 12,0 50,50 90,100 / 88,0 50,50 10,100
mark: 5,55 20,75 35,95 > 65,50 95,5 | 66,36 42,34 36,58 56,66 66,36 68,62 88,60 92,28 56,4 14,22 6,66 38,98 82,90 | 0,50
50,50 100,50 / 70,25 85,38 100,50 / 70,75 85,62 100,50 | 0,50 50,50 100,50 / 50,0 50,50 50,100 | 12,24 40,0 78,10 78,36
50,54 48,74 / 42,92 52,88 58,96 48,100 | 10,10 50,50 90,90 / 90,10 50,50 10,90 / 50,0 50,50 50,100 | 50,5 72,50 95,92 >
50,92 5,92 > 28,50 50,5 | 5,30 50,30 95,30 / 5,70 50,70 95,70 | 92,100 50,50 28,16 50,0 66,18 40,46 10,74 34,100 66,90
90,60 | 30,0 28,50 26,100 / 70,0 72,50 74,100 / 0,32 50,32 100,32 / 0,68 50,68 100,68 | 5,5 50,5 95,5 > 95,50 95,95 >
50,95 5,95 > 5,50 5,5 > 50,50 95,95 / 95,5 50,50 5,95 | 20,100 35,50 50,0 > 65,50 80,100 > 45,68 0,38 > 50,38 100,38 >
60,68 20,100 | 0,0 50,0 100,0 / 0,50 50,50 100,50 / 0,100 50,100 100,100 / 0,0 0,50 0,100 / 50,0 50,50 50,100 / 100,0
100,100
"""
WAYS = {label: ways.split("|") for label, ways in re.findall(r"(\w+):([^:]*)\n", STROKES)}  # of each label

if __name__ == "__main__":  # below the tables, which it needs
    if sys.stdout is None or hasattr(sys.stdout, "reconfigure"):  # not in IDLE or a notebook
        prepare_streams()
    sys.exit(main())
