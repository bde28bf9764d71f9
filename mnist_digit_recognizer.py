#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "numpy>=1.26",
#     "matplotlib>=3.8",
#     "tensorflow>=2.16",
#     "scipy>=1.11,<2",
#     "pillow>=10.1",
# ]
# ///
"""Train a network that reads handwritten digits, measure it, and read your own pictures with it.

99.66% of MNIST's test images (mean of five seeds), in no more time than Keras' official example takes for 99.17%.

    python mnist_digit_recognizer.py                             # train on MNIST, results in outputs/
    python mnist_digit_recognizer.py --predict my_digits/        # then: which digits are these?

The file reads from top to bottom in the order in which data flows: configuration, data, preprocessing, augmentation,
model, training, evaluation, your own images, plots, outputs, main. No part uses anything of a part below it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports shows no traceback

import numpy as np

if TYPE_CHECKING:  # imported where they are first needed, so that --help and a wrong flag answer at once
    import keras
    import tensorflow as tf
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

VERSION = "1.0.0"
STARTED = time.perf_counter()
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_BELOW_MINIMUM = 0, 1, 2, 3


class Failure(Exception):
    """The run cannot go on, and its user can do something about it: one line says what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: flags -> a frozen dataclass. Every check that needs no data is made here, before TensorFlow loads.
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """All flags of a run; their meaning and defaults stand in `build_parser`."""

    data: str
    train_limit: int | None
    validation_split: float
    augment: str
    rotation: float
    shift: float
    zoom: float
    shear: float
    elastic: float
    flip: bool
    model: str
    epochs: int
    batch_size: int
    learning_rate: float
    label_smoothing: float
    dropout: float
    patience: int
    seed: int
    resume: bool
    members: int
    strategy: str
    output_dir: Path
    plots: bool
    min_accuracy: float | None
    quiet: bool
    model_file: Path
    combine: list[Path] | None
    evaluate: bool
    predict: list[Path] | None


# The flags that decide which weights a run ends with; a run may be taken up again only with the same ones.
RESULT_FLAGS = (
    "train_limit validation_split augment rotation shift zoom shear elastic flip model epochs batch_size learning_rate "
    "label_smoothing dropout patience seed members"
).split()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of after thirty lines of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message}; see --help\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that takes a value; where there is none, the help text says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        takes_none = action.default is None or isinstance(action.default, bool)
        return action.help if takes_none else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf, *, exclusive: bool = False) -> Callable[[str], Any]:
    """A converter for argparse: a finite `kind` in [low, high], or in the open interval where `exclusive`."""

    def convert(text: str) -> Any:
        value = kind(text)
        inside = low < value < high if exclusive else low <= value <= high and value != math.inf
        if not inside:  # nor is NaN inside of anything
            open_end = "more than" if exclusive else "at least"
            bound = "" if high == math.inf else f" and {'less than' if exclusive else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {open_end} {low:g}{bound}")
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it: "invalid number value: 'x'"
    return convert


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Train a network that reads handwritten digits, measure it, and read your own pictures with it.",
        epilog="exit codes: 0 done, 1 failed (one line says why), 2 wrong usage, 3 done but below --min-accuracy, "
        "130 and 143 stopped by SIGINT and SIGTERM",
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # a script that says --epoch today must not break when --epoch-size comes
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="auto",
        metavar="SOURCE",
        help="auto: MNIST, or synthetic digits where it cannot be had; mnist; synthetic; an .npz file with x_train, "
        "y_train, x_test, y_test; or a folder with the four IDX files",
    )
    data.add_argument(
        "--train-limit", type=number(int, 2), metavar="N", help="use only the first N training images (default: all)"
    )
    data.add_argument(
        "--validation-split",
        type=number(float, 0, 1, exclusive=True),
        default=0.1,
        metavar="F",
        help="the last F of the training images are held out, to validate and calibrate on",
    )

    augmentation = parser.add_argument_group("augmentation (each range is symmetric about no change)")
    augmentation.add_argument(
        "--augment",
        choices=["fast", "keras", "none"],
        help="fast: affine maps and varied light on whole batches; keras: the affine maps by ImageDataGenerator "
        "(default: fast; none for the mlp, which is too small to gain by it)",
    )
    # The ranges are those of handwriting: larger ones make other digits of some (a 7 turned far enough is a 1).
    augmentation.add_argument("--rotation", type=number(float, 0, 180), default=10.0, metavar="DEG", help="degrees")
    augmentation.add_argument("--shift", type=number(float, 0, 0.5), default=0.08, metavar="FRAC", help="of the width")
    augmentation.add_argument("--zoom", type=number(float, 0, 0.9), default=0.1, metavar="FRAC", help="of the size")
    augmentation.add_argument("--shear", type=number(float, 0, 1), default=0.1, metavar="FRAC", help="of the height")
    augmentation.add_argument(
        "--elastic", type=number(float, 0, 10), default=0.0, metavar="PX", help="bend the strokes by about PX pixels"
    )
    augmentation.add_argument(
        "--flip",
        action="store_true",
        help="mirror half of the images; a mirrored 2 is no 2, so leave it off for digits",
    )

    training = parser.add_argument_group("model and training")
    training.add_argument("--model", choices=["cnn", "mlp"], default="cnn", help="mlp: a 784-10-10-10-10 network")
    training.add_argument("--epochs", type=number(int, 1, 100_000), default=9, metavar="N", help="passes over the data")
    training.add_argument(
        "--batch-size", type=number(int, 1, 1_000_000), default=128, metavar="N", help="images a step"
    )
    training.add_argument(
        "--learning-rate",
        type=number(float, 0, exclusive=True),
        default=5e-3,
        metavar="RATE",
        help="Adam's, at the peak of the one-cycle schedule",
    )
    training.add_argument(
        "--label-smoothing",
        type=number(float, 0, 0.9),
        default=0.1,
        metavar="F",
        help="share of each label that is spread over all ten digits while training",
    )
    training.add_argument(
        "--dropout", type=number(float, 0, 0.95), default=0.0, metavar="F", help="before the last layer"
    )
    training.add_argument(
        "--patience",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="stop after N epochs without a better validation loss and keep the best weights; 0: never",
    )
    training.add_argument(
        "--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help="of every random choice"
    )
    training.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last finished epoch of a run that was stopped, with the same result as if it had not been",
    )
    training.add_argument(
        "--members",
        type=number(int, 1, 1000),
        default=1,
        metavar="N",
        help="train a committee of N networks, with the seeds --seed, --seed + 1, ..., and save it as one model",
    )
    training.add_argument(
        "--strategy",
        choices=["auto", "none", "mirrored"],
        default="auto",
        help="mirrored: each batch is shared out among this machine's GPUs; auto: so where there are two or more",
    )

    results = parser.add_argument_group("results")
    results.add_argument("--output-dir", type=Path, default=Path("outputs"), metavar="DIR", help="where results go")
    results.add_argument("--no-plots", dest="plots", action="store_false", help="write no PNG files")
    results.add_argument(
        "--min-accuracy",
        type=number(float, 0, 1),
        metavar="F",
        help="exit 3 where the test accuracy is below F (default: any accuracy will do)",
    )
    results.add_argument("--quiet", action="store_true", help="print the last line of the summary and errors only")

    use = parser.add_argument_group("using a model")
    use.add_argument(
        "--model-file", type=Path, metavar="FILE", help="a saved model (default: model.keras in the output folder)"
    )
    action = use.add_mutually_exclusive_group()
    action.add_argument(
        "--combine",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="no training: join the models of earlier runs, model.keras in each of these folders, into a committee",
    )
    action.add_argument(
        "--evaluate", action="store_true", help="no training: measure --model-file on the test images of --data"
    )
    action.add_argument(
        "--predict", type=Path, nargs="+", metavar="PATH", help="no training: read image files, or all in a folder"
    )
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """Flags -> Config. Exits with code 2 where they are wrong."""
    parser = build_parser()
    flags = parser.parse_args(arguments)
    if flags.model_file and not (flags.evaluate or flags.predict):
        parser.error("--model-file goes with --evaluate or --predict; a training run always makes a new model")
    if flags.combine and len(flags.combine) < 2:
        parser.error("--combine needs two or more folders")
    if flags.resume and (flags.combine or flags.evaluate or flags.predict):
        parser.error("--resume goes with a training run only")
    if flags.min_accuracy is not None and flags.predict:
        parser.error("--min-accuracy does not go with --predict, where the true digits are not known")
    flags.augment = flags.augment or {"cnn": "fast", "mlp": "none"}[flags.model]
    flags.model_file = flags.model_file or flags.output_dir / "model.keras"
    return Config(**vars(flags))


def say(*values: str) -> None:
    """Print values with tabs between them, at once, so that a log file can be followed."""
    try:
        print(*values, sep="\t", flush=True)
    except OSError:  # whoever read along has gone, or the log's disk is full: the run goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def announce(config: Config) -> Callable[[str], None]:
    """What to print progress with: nothing under --quiet."""
    return (lambda line: None) if config.quiet else say


def open_standard_streams() -> None:
    """Give a process that was started without them (`>&-`) its three streams, so that no file takes their numbers."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that the terminal cannot show ends no run


def warn(line: str) -> None:
    """Print to standard error, so that what is read by machines stays clean."""
    try:
        print(line.translate({10: "\\n", 13: "\\r"}), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep out of standard error what C libraries print there of their own accord; where they fail, an error tells."""
    with open(os.devnull, "w") as nowhere:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def import_tensorflow() -> None:
    """Import TensorFlow without its start-up chatter, which it prints before it reads its log level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with hushed():
        import tensorflow  # noqa: F401


# ---------------------------------------------------------------------------------------------------------------------
# Data: a source -> Digits
# ---------------------------------------------------------------------------------------------------------------------

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
IDX_NAMES = ("train-images", "train-labels", "t10k-images", "t10k-labels")  # in the order of NPZ_KEYS
ACCEPTED_SHARE = 0.995  # of the validation digits are above the rejection threshold
MAX_IMAGES = 1_000_000  # a file that promises more is taken for damaged or hostile
MNIST_SHA256 = "25c98f992c005963b7428e1f38418b233c9b286cc403519287eb8063f0bcfe07"  # of its arrays
DOWNLOAD_PATIENCE_SECONDS = 10  # without a byte; a firewall that swallows packets must not cost minutes


class Digits(NamedTuple):
    """A data set: images uint8 (n, 28, 28), light ink on black; labels uint8 (n,), 0 to 9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    name: str
    origin: str


def load_digits(source: str) -> Digits:
    """Load the data set that `--data` names.

    Raises:
        Failure: it cannot be had, or is damaged; the message names the file and the fault.
    """
    if source == "synthetic":
        return load_synthetic("drawn from strokes")
    if source in ("auto", "mnist"):
        try:
            return load_mnist()
        except Failure as failure:
            if source == "mnist":
                raise
            warn(f"WARNING: {failure}")
            warn("WARNING: this run uses SYNTHETIC digits, drawn from strokes. Its figures are NOT those of MNIST.")
            return load_synthetic(f"drawn from strokes, because MNIST could not be had: {failure}")
    path = Path(source)
    try:
        arrays = read_idx_folder(path) if path.is_dir() else read_npz(path)
    except OSError as error:
        raise Failure(f"--data {source}: {describe(error)}") from error
    name = path.resolve().stem
    if sha256_of_arrays(arrays) == MNIST_SHA256:
        name = "mnist"
    elif name in ("mnist", "synthetic"):
        name = f"own-{name}"  # these two names are earned by content
    return Digits(*arrays, name=name, origin=str(path))


def load_synthetic(origin: str) -> Digits:
    # One seed for all runs: like MNIST, the data set stays the same while --seed varies the training.
    images, labels = synthetic_digits(70_000, seed=0)
    return Digits(images[:60_000], labels[:60_000], images[60_000:], labels[60_000:], "synthetic", origin)


def load_mnist() -> Digits:
    """MNIST from Keras' cache, or downloaded into it.

    Raises:
        Failure: neither works.
    """
    cache = Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")) / "datasets" / "mnist.npz"
    if cache.is_file():
        with contextlib.suppress(Failure):  # a damaged copy is downloaded anew
            arrays = read_npz(cache)
            if sha256_of_arrays(arrays) == MNIST_SHA256:
                return Digits(*arrays, name="mnist", origin=str(cache))
    (x_train, y_train), (x_test, y_test) = download_mnist(cache)
    return Digits(x_train, y_train, x_test, y_test, name="mnist", origin="keras.datasets.mnist")


def download_mnist(cache: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """keras.datasets.mnist.load_data(), given up where no byte arrives for a while.

    A time-out on the socket would not do: name servers and each of a host's many addresses have time-outs of their own.
    """
    import keras

    outcome: list[Any] = []

    def load() -> None:
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # Keras' bar, as we show none
                outcome.append(keras.datasets.mnist.load_data())
        except Exception as error:
            outcome.append(error)

    socket.setdefaulttimeout(DOWNLOAD_PATIENCE_SECONDS)
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    bytes_seen, last_progress = -1, time.monotonic()
    while thread.is_alive() and time.monotonic() - last_progress < DOWNLOAD_PATIENCE_SECONDS:
        thread.join(0.2)
        size = sum(part.stat().st_size for part in cache.parent.glob("mnist.npz*"))
        if size != bytes_seen:
            bytes_seen, last_progress = size, time.monotonic()
    socket.setdefaulttimeout(None)
    if outcome and not isinstance(outcome[0], Exception):
        return outcome[0]
    reason = str(outcome[0]).splitlines()[0] if outcome else f"no answer in {DOWNLOAD_PATIENCE_SECONDS} seconds"
    raise Failure(
        f"MNIST could not be downloaded ({reason}); put mnist.npz at {cache}, or name a copy with --data FILE.npz"
    )


def read_npz(path: Path) -> list[np.ndarray]:
    """The arrays x_train, y_train, x_test, y_test of an .npz file, checked. Nothing in it is ever unpickled.

    Raises:
        Failure: the file is no such archive, or damaged, or holds something else.
    """
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise Failure(f"--data {path}: {problem}; give auto, mnist, synthetic, an .npz file or a folder of IDX files")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            missing = [key for key in NPZ_KEYS if f"{key}.npy" not in archive.namelist()]
            if missing:
                raise Failure(f"{path}: has no array {missing[0]}; an .npz needs {', '.join(NPZ_KEYS)}")
            arrays = [read_npy(archive, key) for key in NPZ_KEYS]
    except Failure:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds at damaged files
        raise Failure(f"{path}: is no readable .npz file ({describe(error)}); make or copy it anew") from error
    return check_digits(arrays, [f"{path}: {key}" for key in NPZ_KEYS])


def read_npy(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array of an .npz archive; its header is checked before memory is taken for what it promises."""
    with archive.open(f"{key}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{key} has .npy version {version}, not (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if math.prod(shape) * dtype.itemsize > MAX_IMAGES * 28 * 28 or dtype.hasobject:
        raise ValueError(f"{key} promises {shape} values of type {dtype}")
    with archive.open(f"{key}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def read_idx_folder(folder: Path) -> list[np.ndarray]:
    """The four arrays of MNIST's own file format (IDX), gzipped or not, checked.

    Raises:
        Failure: a file is missing or damaged.
    """
    arrays, names = [], []
    for stem in IDX_NAMES:
        kind = "idx3" if stem.endswith("images") else "idx1"
        candidates = [folder / f"{stem}{dot}{kind}-ubyte{zipped}" for dot in "-." for zipped in ("", ".gz")]
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            raise Failure(f"{folder}: has no {candidates[0].name} (or .gz); it needs the four IDX files of MNIST")
        arrays.append(read_idx(path))
        names.append(str(path))
    return check_digits(arrays, names)


def read_idx(path: Path) -> np.ndarray:
    """One IDX file -> uint8 (n, 28, 28) images or (n,) labels, by what its header says."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            magic, count = (int.from_bytes(stream.read(4), "big") for _ in range(2))
            dimensions = {2049: 0, 2051: 2}.get(
                magic
            )  # 0x0801 and 0x0803: unsigned bytes, in one and in three dimensions
            if dimensions is None:
                raise Failure(f"{path}: begins with {magic}, not with 2051 (images) or 2049 (labels): no IDX file")
            shape = (count, *(int.from_bytes(stream.read(4), "big") for _ in range(dimensions)))
            size = math.prod(shape)
            if size > MAX_IMAGES * 28 * 28:
                raise Failure(f"{path}: its header promises {shape}, more than this program reads: it is damaged")
            content = stream.read(size + 1)  # one more than there should be, to notice what is too long
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Failure(f"{path}: cannot be read ({describe(error)}); copy it anew") from error
    if len(content) != size:
        found = "more" if len(content) > size else len(content)
        raise Failure(f"{path}: its header promises {size} bytes, but it holds {found}: copy it anew")
    return np.frombuffer(content, np.uint8).reshape(shape)


def check_digits(arrays: Sequence[np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """Return the four arrays, labels as uint8, where they are a data set of digits.

    Raises:
        Failure: with the name of the first array that is not as it should be.
    """
    checked = []
    for (images, labels), (images_name, labels_name) in zip(
        (arrays[:2], arrays[2:]), (names[:2], names[2:]), strict=True
    ):
        if images.ndim != 3 or images.shape[1:] != (28, 28):
            raise Failure(f"{images_name}: has shape {images.shape}, not (n, 28, 28)")
        if images.dtype != np.uint8:
            raise Failure(f"{images_name}: has type {images.dtype}, not uint8 (0 black to 255 white)")
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise Failure(f"{labels_name}: has shape {labels.shape} and type {labels.dtype}, not whole numbers (n,)")
        if len(images) != len(labels):
            raise Failure(f"{labels_name}: has {len(labels)} labels for {len(images)} images")
        wrong = labels[(labels < 0) | (labels > 9)]
        if len(wrong):
            raise Failure(f"{labels_name}: holds the label {wrong[0]}; digits are 0 to 9")
        missing = sorted(set(range(10)) - set(labels.tolist()))
        if missing:
            raise Failure(
                f"{labels_name}: has no image of {', '.join(map(str, missing))}; each digit needs one or more"
            )
        checked += [images, labels.astype(np.uint8)]
    return checked


def sha256_of_arrays(arrays: Sequence[np.ndarray]) -> str:
    """SHA-256 (hexadecimal) of shapes and values, the same wherever the arrays came from."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def describe(error: BaseException) -> str:
    """An exception in a few words on one line, for the end of a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [""])[0].strip()[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic digits: drawn from strokes, for machines that have no data set
# ---------------------------------------------------------------------------------------------------------------------

# One string is one way to write the digit. Its strokes are separated by " / "; a stroke is a list of points "x,y" in a
# box of 100 x 100 (x to the right, y down) through which the pen runs in a smooth curve, so a sharp corner is the end
# of one stroke and the start of the next. Odd habits are here on purpose: each line is one that a network trained on
# neater digits gets wrong.
DIGIT_STROKES: dict[int, tuple[str, ...]] = {
    0: (
        "50,0 20,14 10,50 24,86 50,100 76,86 90,50 80,14 50,0",
        "56,2 24,16 10,54 24,92 52,98 82,76 90,40 72,8 44,4",  # the end runs over the start
        "30,12 12,40 12,74 36,98 68,94 90,66 88,28 62,5",  # open at the top
        "66,4 34,6 12,40 14,78 38,98 66,90 88,56 86,20 60,2",
        "76,2 40,16 14,54 12,86 34,98 66,80 90,40 84,10 60,6",  # slanted
        "78,8 54,0 24,16 8,54 18,88 46,98 78,78 92,40 82,12 64,2",
        "76,0 46,10 14,40 14,78 40,98 72,84 88,52 78,22 50,14 30,22",  # the start sticks out
        "60,0 34,18 12,54 24,90 52,98 80,78 86,44 68,18 44,16",
        "50,0 48,10 22,24 10,56 28,92 56,98 84,76 88,40 70,16 46,10",
        "58,0 28,18 10,56 24,92 54,98 82,74 86,40 64,20 42,26",
        "72,20 44,2 14,28 8,62 34,97 68,90 88,56 80,18 52,3 44,16",  # the end curls in
        "36,14 14,36 10,66 30,96 60,96 84,72 90,36 72,6 38,2 24,24",  # the end goes a long way round
        "76,12 44,2 16,30 8,70 30,98 60,90 84,58 90,24 70,4 50,20",
        "50,0 20,14 10,50 24,86 50,100 76,86 90,50 80,14 50,0 / 84,6 50,50 16,94",  # slashed
    ),
    1: (
        "50,0 50,50 50,100",
        "60,0 50,50 40,100",
        "74,0 50,48 26,100",
        "53,0 47,50 50,100",
        "44,0 52,50 46,100",
        "38,20 46,13 54,0 / 54,0 54,50 54,100",  # a short flag
        "16,42 38,24 60,0 / 60,0 60,50 60,100",  # a long flag, as in Europe
        "30,22 42,14 54,0 / 54,0 54,50 54,100 / 18,100 54,99 88,100",  # a flag and a foot
        "14,36 36,22 56,0 / 56,0 56,50 56,100 / 26,100 56,99 86,100",
    ),
    2: (
        "15,25 25,7 50,0 75,8 82,28 70,50 40,78 12,98 / 12,98 50,97 90,96",
        "10,20 28,4 56,2 76,20 66,48 38,76 8,94 / 8,94 34,88 62,98 96,90",  # a wavy foot
        "18,30 24,8 54,0 76,16 72,44 50,72 22,96 / 22,96 54,94 84,100",
        "12,14 40,4 76,8 78,24 50,56 10,96 / 10,96 50,98 98,92",  # nearly a Z
        "22,24 36,4 52,10 50,46 36,94 / 36,94 60,95 88,92",  # a small arch
        "30,20 44,6 58,4 50,40 34,80 20,96 6,92 16,80 50,84 100,82",  # a small arch and loop
        "40,14 52,2 62,14 46,56 30,92 12,94 14,84 50,86 96,92",
        "12,30 30,6 62,4 76,24 60,50 36,72 12,80 4,68 22,58 46,66 68,84 84,100",  # the foot drops
        "20,16 46,0 74,14 74,48 48,76 18,76 6,62 24,50 56,62 80,80 88,100",
        "52,24 30,30 18,16 36,2 64,6 70,30 56,64 28,92 8,94 16,80 50,88 92,92",  # a loop at both ends
        "15,22 30,5 55,0 80,15 78,40 55,70 25,93 12,90 20,75 42,82 65,95 92,92",  # a loop
        "20,20 45,0 75,10 75,40 50,70 20,95 10,85 25,75 50,90 95,100",
        "8,26 34,3 66,4 76,26 62,58 34,88 8,94 4,78 24,68 48,78 70,92 100,84",  # a wide loop
        "22,26 36,4 60,2 76,22 70,54 44,86 16,98 0,88 8,68 34,66 58,80 78,92 100,86",  # a large, round loop
        "16,22 40,0 68,6 76,34 64,70 38,96 10,94 4,74 26,58 54,66 76,86 98,92",  # the loop as large as the arch
        "14,30 40,8 70,14 68,40 46,66 22,84 6,82 8,70 28,72 60,86 98,76",
        "30,26 22,12 40,0 64,6 70,28 54,62 24,94 10,90 26,82 60,94 96,98",  # the top curls in
        "14,16 46,0 70,14 64,50 40,86 18,98 10,84 28,72 56,70 98,62",  # the foot rises
    ),
    3: (
        "15,12 40,0 70,5 78,25 60,42 38,47 / 38,47 70,52 85,72 70,93 40,100 12,90",
        "14,20 34,2 64,4 72,22 56,40 34,48 / 34,48 62,50 78,66 68,90 38,100 4,92",
        "20,10 50,0 78,12 70,35 50,45 48,48 75,55 82,78 60,98 30,100 10,88",  # a small loop in the middle
        "12,14 48,0 80,10 68,32 40,48 34,42 52,42 78,56 78,82 44,100 2,90",
        "12,6 45,5 80,4 / 80,4 62,24 40,44 / 40,44 70,47 84,68 70,94 40,100 12,92",  # a flat top
        "16,8 48,0 76,14 62,38 36,50 62,46 76,60 62,84 30,100 0,98",
        "10,16 40,0 74,6 70,28 46,46 / 46,46 66,54 72,68 56,88 18,100",  # the lower half runs out
        "8,26 30,2 66,2 74,22 48,44 76,52 90,74 66,98 26,100 12,80 24,74",  # both ends curl
        "10,10 40,2 66,14 42,42 / 42,42 74,50 80,70 54,92 / 54,92 34,94 0,92",  # a flat foot
        "12,10 44,0 68,14 40,44 70,54 74,76 40,92 2,92 40,88 92,86",
        "24,2 60,2 60,24 36,40 / 36,40 70,44 78,70 54,94 8,100",  # a small upper half
        "10,20 34,0 62,8 60,30 40,42 / 40,42 80,40 94,62 76,90 36,100 4,84",  # a large lower half
    ),
    4: (
        "20,5 17,30 15,55 / 15,55 50,55 88,50 / 78,2 74,50 70,100",  # open, of three strokes
        "20,2 14,30 22,50 50,52 75,42 / 82,2 76,42 68,100",  # open and round
        "16,4 8,34 18,56 46,56 76,40 / 78,0 76,40 66,66 58,100",
        "24,4 10,38 8,56 / 8,56 48,54 98,46 / 62,26 56,60 46,100",  # the second stroke starts low
        "30,0 18,30 8,58 / 8,58 50,56 92,58 / 58,34 57,60 56,100",
        "20,0 12,30 4,62 / 4,62 50,64 100,60 / 74,4 70,50 66,100",  # a low bar
        "65,0 40,33 8,66 / 8,66 50,66 95,64 / 65,0 66,50 66,100",  # closed
        "70,2 35,30 10,55 / 10,55 40,56 80,50 / 72,2 68,50 62,100",
        "10,10 6,34 12,48 40,50 68,40 84,8 / 84,8 74,44 66,100",  # in one go
    ),
    5: (
        "85,2 50,3 25,4 / 25,4 22,25 18,45 / 18,45 45,38 75,50 82,75 60,95 35,100 10,90",
        "90,0 60,3 35,8 27,30 30,42 60,50 75,68 65,90 40,100 10,95",  # round, like an S
        "84,6 56,2 34,14 30,34 52,46 70,62 64,88 38,100 14,88",
        "30,5 25,25 20,42 / 20,42 50,40 78,58 75,82 50,98 15,92 / 30,5 60,5 98,0",  # the bar comes last
        "26,12 24,28 18,46 / 18,46 46,40 74,54 72,82 44,100 10,90 / 34,4 64,2 92,3",  # a detached bar
        "34,18 26,46 / 26,46 56,46 64,66 46,92 4,98 / 34,18 64,10 100,0",  # a long, rising bar
        "44,10 32,40 / 32,40 56,50 56,74 34,96 2,94 / 44,10 70,8 100,2",
        "80,4 30,6 / 30,6 28,44 / 28,44 64,42 80,66 66,94 30,100 12,84 26,74",  # the end curls in
        "90,4 58,6 32,8 / 32,8 26,40 / 26,40 66,38 82,66 62,96 26,98 12,78",
        "28,14 24,40 / 24,40 60,34 82,60 64,92 28,98 14,78 26,56 / 30,12 60,8 88,4",  # a closed bowl
        "36,8 30,40 / 30,40 58,44 64,70 40,98 14,92 14,72 30,60 / 36,8 66,8 100,4",
        "22,10 16,46 / 16,46 46,34 80,48 78,80 46,98 14,88 10,70 / 24,10 60,8 96,6",
        "98,2 64,6 36,12 / 36,12 28,44 50,52 62,70 46,94 16,100 0,84",
    ),
    6: (
        "70,0 40,20 20,50 17,78 35,98 65,95 80,75 65,57 40,60 20,78",
        "55,0 30,30 18,65 30,93 55,98 75,82 70,62 48,56 22,72",
        "85,5 55,8 28,35 15,70 35,97 68,93 78,72 60,58 30,66 20,75",  # a curved back
        "44,0 20,34 10,66 22,94 54,100 84,84 86,58 64,44 36,56 14,84",  # a large loop
        "34,0 20,30 14,62 22,92 52,100 80,84 80,62 58,52 34,62 26,86",  # a straight back, like a b
        "66,0 40,24 22,56 24,86 46,100 66,88 66,68 48,64 30,80 26,94",  # a small loop
        "60,0 26,26 6,62 18,94 50,98 88,78 98,58 80,48 52,62 40,88",  # the loop runs wide
        "72,2 36,28 14,68 22,96 44,98 66,76 74,56 58,50 32,70 8,86",  # the loop crosses the back
        "78,16 66,2 38,12 16,44 14,78 40,98 74,90 80,66 56,54 22,66",  # the top curls in
        "46,0 26,34 12,72 16,92 44,96 76,82 90,62 76,54 56,68 46,90",  # a flat loop on the right
        "40,0 26,36 20,70 24,98 52,96 74,80 70,64 50,70 38,92",
        "60,0 34,28 14,64 12,90 30,98 58,84 76,62 72,52 50,60 24,84",
        "42,2 18,40 10,80 30,99 64,92 84,66 80,48 70,52",  # the loop stays open
    ),
    7: (
        "10,8 45,6 85,4 / 85,4 62,45 42,100",
        "8,4 40,5 76,2 / 76,2 70,48 66,100",  # a steep leg
        "6,12 40,6 88,0 / 88,0 50,48 10,100",
        "8,12 40,2 75,5 82,20 65,55 55,100",  # a round shoulder
        "10,25 13,8 / 13,8 50,8 85,3 75,30 55,65 45,100",  # a serif
        "14,34 10,10 / 10,10 46,12 80,2 / 80,2 66,50 60,100",
        "8,30 16,4 40,4 72,10 / 72,10 60,52 44,100",
        "10,12 44,10 84,4 / 84,4 56,36 42,70 38,100",
        "6,8 40,8 76,6 / 76,6 52,40 40,72 44,98",
        "12,36 18,6 / 18,6 50,10 86,0 / 86,0 60,44 48,100",  # a long serif
        "10,10 45,6 85,4 / 85,4 62,45 42,100 / 30,52 55,50 82,48",  # a bar
        "6,22 10,6 / 10,6 46,8 84,4 / 84,4 58,50 44,100 / 24,56 56,50 88,50",  # a serif and a bar
        "12,12 50,8 86,0 / 86,0 60,44 46,100 / 12,62 50,52 96,40",  # a long, rising bar
        "8,6 44,8 80,4 / 80,4 52,42 40,80 48,98",  # the leg ends in a hook
        "6,10 40,8 78,2 / 78,2 58,40 38,78 38,90 48,97",
        "8,18 26,2 50,10 80,2 64,44 48,100",  # a wavy top
        "6,14 40,8 80,6 / 80,6 46,44 34,72 40,100",  # a bent leg
    ),
    8: (
        "75,12 50,0 25,12 28,32 50,47 75,65 80,85 50,100 20,86 27,65 50,48 75,30 75,12",
        "80,10 45,2 25,20 50,45 72,68 60,95 30,97 25,72 55,45 85,15",
        "50,47 22,30 30,5 65,2 78,22 50,47 20,72 30,98 65,98 80,72 50,47",  # starts in the middle
        "92,6 70,20 46,46 22,74 24,96 50,98 64,78 48,54 28,34 30,12 54,0 72,8",  # starts at the top right
        "64,8 38,2 24,22 44,42 66,60 64,90 36,100 20,82 40,58 66,36 94,12",  # open at the top right
        "72,4 34,2 20,20 44,38 56,54 50,88 24,100 16,80 38,54 98,8",
        "50,0 26,10 26,36 50,46 74,36 74,10 50,0 / 50,46 20,58 20,88 50,100 80,88 80,58 50,46",  # two circles
        "54,0 30,4 26,22 48,30 70,20 70,6 54,0 / 46,32 16,48 16,86 44,100 76,86 78,50 46,32",  # a small head
        "74,34 84,10 54,0 18,12 20,42 48,62 64,78 58,96 40,98 34,82 52,62 74,34",  # a large head
        "22,8 34,44 58,66 66,90 46,100 30,88 42,62 66,36 76,6",  # open at the top
        "24,98 34,70 62,40 70,14 50,0 30,10 36,38 62,68 72,98",  # open at the bottom
        "80,18 56,0 28,10 34,34 66,56 74,84 48,100 24,88 30,66 54,50",  # an S, half closed
    ),
    9: (
        "78,20 55,2 25,12 18,35 40,50 68,38 78,18 / 78,18 76,50 70,100",
        "75,12 45,2 20,20 28,45 55,45 75,20 76,15 74,50 62,85 35,100",  # a hooked leg
        "80,8 50,2 22,18 25,42 52,44 78,20 72,55 55,100",
        "76,4 40,2 10,24 18,44 46,42 78,14 / 78,14 70,56 62,100",  # a flat loop
        "70,20 56,0 30,6 20,30 36,46 60,36 70,14 74,48 66,100",
        "78,22 50,0 16,14 12,42 40,54 72,38 80,14 84,58 68,94 40,100 16,88",  # a wide hook
        "66,14 48,0 30,10 28,28 44,34 62,22 66,8 62,50 56,100",  # a small loop
        "84,6 54,4 24,26 24,44 44,46 72,26 / 84,6 68,52 48,100",  # the loop stays open
        "84,12 50,0 14,20 6,52 24,66 58,50 82,14 / 82,14 82,56 86,100",  # a large loop, like an a
        "86,20 60,4 24,14 10,42 30,56 62,46 84,22 76,58 66,100",
        "90,8 56,0 26,22 30,42 60,40 82,22 66,60 40,100",  # a slanted loop
        "64,2 34,10 18,34 34,50 62,38 76,16 / 80,6 74,50 64,100",  # the leg starts over the loop
        "62,6 36,6 14,26 16,46 42,46 70,24 86,6 / 86,6 72,50 62,100",  # the leg starts above the loop
        "70,10 44,4 18,20 14,42 40,48 70,30 / 74,6 70,50 60,100",
        "74,4 40,4 18,14 20,40 48,44 76,34 / 74,4 76,50 74,100",  # square
        "68,8 36,4 14,24 20,44 46,44 72,24 / 80,8 74,50 62,100",  # nearly a 4, but the arch is closed
        "92,2 56,8 22,24 20,44 44,48 72,30 84,14 / 84,14 72,54 60,100",  # the start sticks out
        "84,8 52,0 26,14 30,34 58,40 78,22 / 78,22 72,60 40,96",
        "82,6 52,0 30,10 28,26 52,34 72,28 80,14 70,58 52,100",
        "62,6 40,4 24,20 26,40 46,44 72,22 / 72,22 66,60 54,100",  # an open loop
        "56,2 30,10 16,32 26,48 50,42 84,16 / 84,16 70,56 58,100",
        "78,4 44,4 22,24 30,42 56,38 76,24 66,60 50,100",
        "74,14 46,2 18,20 14,42 36,48 66,34 / 84,0 76,50 70,100",
    ),
}

# Letters that no hand writes like a digit (so no O, I, S, Z, B, b, g, q or G), in their clear forms.
LETTER_STROKES: dict[str, tuple[str, ...]] = {
    "A": ("5,100 28,50 50,0 / 50,0 72,50 95,100 / 22,65 78,65",),
    "a": (
        "78,30 45,12 15,40 20,85 52,90 78,50 / 80,10 78,60 84,90 100,92",
        "20,24 48,4 74,24 76,96 / 74,46 28,52 16,76 40,96 74,76",  # as in print
    ),
    "C": ("88,20 60,2 25,15 8,50 25,87 60,98 90,80", "90,30 52,8 12,50 50,94 94,72"),
    "D": ("15,0 15,50 15,100 / 0,0 50,2 95,30 95,68 50,98 0,100",),
    "d": ("78,58 48,42 16,66 30,98 62,92 78,66 / 80,0 79,50 82,100",),
    "E": (
        "15,0 14,50 15,100 / 15,0 50,2 88,0 / 15,48 45,47 75,48 / 15,100 50,98 90,100",
        "86,12 46,0 22,24 52,46 14,66 30,98 90,90",  # in one go
    ),
    "e": ("12,52 50,54 88,46 74,14 40,6 12,40 22,84 56,98 92,80",),
    "F": ("18,0 17,50 18,100 / 18,0 52,1 90,0 / 18,46 48,46 76,46",),
    "f": ("84,10 62,0 46,20 44,60 42,100 / 14,44 45,42 80,40",),
    "H": ("12,0 12,50 12,100 / 88,0 88,50 88,100 / 12,50 50,49 88,50",),
    "h": ("20,0 20,50 20,100 / 20,64 46,42 72,52 76,100",),
    "J": ("40,0 70,0 100,0 / 70,0 70,60 56,96 24,98 6,72",),
    "j": ("60,24 60,70 50,96 20,92 / 58,0 60,2 62,4",),
    "K": ("15,0 15,50 15,100 / 88,2 52,30 15,58 / 38,42 62,70 92,100",),
    "k": ("20,0 20,50 20,100 / 80,38 50,56 20,72 / 38,62 60,80 84,100",),
    "L": ("15,0 14,50 15,100 / 15,100 50,99 85,100",),
    "M": ("8,100 10,50 12,0 / 12,0 30,35 50,68 / 50,68 70,35 88,0 / 88,0 90,50 92,100",),
    "m": ("6,10 8,50 8,96 / 8,40 26,12 46,24 48,96 / 48,40 68,12 90,24 92,96",),
    "N": ("10,100 10,50 12,0 / 12,0 50,50 88,100 / 88,100 89,50 90,0",),
    "n": ("14,10 16,50 16,96 / 16,42 44,10 78,22 84,96",),
    "P": ("18,0 18,50 18,100 / 18,2 62,0 88,24 62,50 18,52",),
    "Q": ("50,2 20,15 10,50 25,84 50,92 75,84 90,50 78,13 50,2 / 58,62 78,82 100,104",),
    "R": ("18,0 18,50 18,100 / 18,2 62,0 86,24 62,48 18,50 / 44,50 64,74 90,100",),
    "r": ("22,10 24,50 24,96 / 24,48 44,18 84,14",),
    "T": ("5,0 50,1 95,0 / 50,0 50,50 50,100",),
    "t": ("48,0 46,50 52,92 84,90 / 12,30 48,29 86,28",),
    "U": ("8,0 8,50 20,92 50,100 80,92 92,50 92,0",),
    "u": ("12,10 12,60 34,92 66,80 84,50 / 86,10 85,50 96,94",),
    "V": ("8,0 28,50 50,100 / 50,100 72,50 92,0",),
    "W": ("2,0 26,100 / 26,100 50,20 / 50,20 74,100 / 74,100 98,0", "4,4 8,70 30,98 50,40 70,98 92,70 96,4"),
    "X": ("12,0 50,50 90,100 / 88,0 50,50 10,100",),
    "Y": ("8,0 28,25 50,48 / 92,0 70,25 50,48 / 50,48 50,75 50,100",),
    "y": ("12,4 16,36 46,44 80,24 / 86,2 84,60 66,94 30,100 12,84",),
}

# Other marks that people draw, none of them a digit at any angle.
MARK_STROKES: tuple[str, ...] = (
    "5,55 20,75 35,95 / 35,95 65,50 95,5",  # check mark
    "0,50 50,50 100,50 / 70,25 85,38 100,50 / 70,75 85,62 100,50",  # arrow
    "0,50 50,50 100,50 / 50,0 50,50 50,100",  # plus
    "10,10 50,50 90,90 / 90,10 50,50 10,90 / 50,0 50,50 50,100",  # asterisk
    "5,30 50,30 95,30 / 5,70 50,70 95,70",  # equals
    "30,0 28,50 26,100 / 70,0 72,50 74,100 / 0,32 50,32 100,32 / 0,68 50,68 100,68",  # hash
    "12,24 40,0 78,10 78,36 50,54 48,74 / 42,92 52,88 58,96 48,100",  # question mark
    "92,100 50,50 28,16 50,0 66,18 40,46 10,74 34,100 66,90 90,60",  # ampersand
    "66,36 42,34 36,58 56,66 66,36 68,62 88,60 92,28 56,4 14,22 6,66 38,98 82,90",  # at sign
    "5,5 50,5 95,5 / 95,5 95,50 95,95 / 95,95 50,95 5,95 / 5,95 5,50 5,5 / 5,5 50,50 95,95 / 95,5 50,50 5,95",  # box
    "50,5 72,50 95,92 / 95,92 50,92 5,92 / 5,92 28,50 50,5",  # triangle
    "20,100 35,50 50,0 / 50,0 65,50 80,100 / 80,100 45,68 0,38 / 0,38 50,38 100,38 / 100,38 60,68 20,100",  # star
    "0,0 50,0 100,0 / 0,50 50,50 100,50 / 0,100 50,100 100,100 / 0,0 0,50 0,100 / 50,0 50,50 50,100 / 100,0 100,100",
)

TURNABLE = (2, 3, 4, 5, 7)  # no digits any more after a quarter turn
SPLICES = (1, 10, 13, 15, 20, 40, 42, 51, 52, 54, 57, 59, 70)  # 42: the top of a 4 on the bottom of a 2 is no digit
CHUNK = 1000  # images drawn at a time: bounds the memory to about 100 MB


def synthetic_digits(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw (n, 28, 28) uint8 images of digits, light on black, and their (n,) uint8 labels, all equally often."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    counts = np.array([len(ways) for ways in DIGIT_STROKES.values()])
    firsts = np.cumsum(counts) - counts  # where each digit's ways begin in the list of all ways
    choices = firsts[labels] + rng.integers(counts[labels])
    return draw_ways(all_ways(DIGIT_STROKES), choices, rng), labels.astype(np.uint8)


def all_ways(table: dict) -> list[str]:
    """All the ways to write all the characters of a table, in its order."""
    return [way for ways in table.values() for way in ways]


def draw_ways(ways: Sequence[str], choices: np.ndarray, rng: np.random.Generator, turn: float = 0.12) -> np.ndarray:
    """Draw ways[choices[i]] for each of (n,) choices, turned by about `turn` radians: -> (n, 28, 28) uint8."""
    images = np.empty((len(choices), 28, 28), np.uint8)
    for index, way in enumerate(ways):
        rows = np.flatnonzero(choices == index)
        for chunk in np.split(rows, range(CHUNK, len(rows), CHUNK)):
            images[chunk] = ink(bend(write(way, len(chunk), rng), turn, rng), rng)
    return images


def write(way: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Write it n times, each time through slightly other points: -> (n, samples, 2) points along its curves."""
    strokes = [np.array([p.split(",") for p in stroke.split()], float) / 100 - 0.5 for stroke in way.split("/")]
    # A point that two strokes share moves once, for both: strokes that meet go on meeting.
    places, which = np.unique(np.concatenate(strokes), axis=0, return_inverse=True)
    points = places + rng.normal(0, 0.02, (n, *places.shape))
    return spline_matrix(strokes) @ points[:, which.ravel()]


def spline_matrix(strokes: list[np.ndarray]) -> np.ndarray:
    """(samples, points): a spline is linear in its points, so that one matrix draws the curves of all images."""
    from scipy.interpolate import CubicSpline
    from scipy.linalg import block_diag

    blocks = []
    for stroke in strokes:
        knots = np.r_[0, np.cumsum(np.hypot(*np.diff(stroke, axis=0).T))]  # the length of the way to each point
        samples = np.linspace(0, knots[-1], max(4, round(knots[-1] / 0.035)))  # less than a pixel apart
        blocks.append(CubicSpline(knots, np.eye(len(stroke)), bc_type="natural")(samples))
    return block_diag(*blocks)


def bend(points: np.ndarray, turn: float, rng: np.random.Generator) -> np.ndarray:
    """Give each of n drawings a hand of its own: bent by smooth waves, narrowed, slanted, turned. (n, samples, 2)."""
    n = len(points)
    waves = np.sin(points @ rng.normal(0, 3, (n, 2, 6)) + rng.uniform(0, 2 * np.pi, (n, 1, 6)))
    x, y = np.moveaxis(points + waves @ rng.normal(0, 0.035, (n, 6, 2)), 2, 0)
    width = np.exp(rng.normal(-0.1, 0.23, (n, 1)))
    slant = rng.normal(0.12, 0.25, (n, 1))  # most hands lean to the right
    angle = rng.normal(0, turn, (n, 1))
    x = x * width - y * slant
    return np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], 2)


def ink(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw n lines with pens of random width, framed as MNIST frames its digits: (n, samples, 2) -> (n, 28, 28) uint8.

    Every sample leaves a round Gaussian blot. Blots are separable, so their sum is the product of two small matrices;
    its logarithm is, smoothly, the squared distance from a pixel to the line in pen radii, and a ramp one pixel wide at
    one radius makes the grey rim of an anti-aliased stroke.
    """
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
    kinds = (draw_letters, draw_scribbles, draw_marks, draw_pairs, draw_textures)
    sizes = rng.multinomial(n, (0.35, 0.3, 0.15, 0.1, 0.1))
    return rng.permutation(np.concatenate([draw(size, rng) for draw, size in zip(kinds, sizes, strict=True)]))


def draw_letters(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw letters that look like no digit: (n, 28, 28) uint8."""
    ways = all_ways(LETTER_STROKES)
    return draw_ways(ways, rng.integers(len(ways), size=n), rng)


def draw_marks(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw crosses, arrows and other marks, which may be turned further than letters: (n, 28, 28) uint8."""
    return draw_ways(MARK_STROKES, rng.integers(len(MARK_STROKES), size=n), rng, turn=0.4)


def draw_pairs(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw two characters in the space of one, each a letter or a digit: (n, 28, 28) uint8."""
    ways = all_ways(DIGIT_STROKES | LETTER_STROKES)
    return squeeze(*draw_ways(ways, rng.integers(len(ways), size=2 * n), rng).reshape(2, n, 28, 28))


def squeeze(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Put two (n, 28, 28) uint8 stacks side by side, each at half its width."""
    wide = np.concatenate([left[:, :, 4:24], right[:, :, 4:24]], axis=2)
    narrow = wide.reshape(-1, 28, 20, 2).mean(3).astype(np.uint8)
    return np.pad(narrow, ((0, 0), (0, 0), (4, 4)))


def draw_scribbles(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a curve through random points, a zigzag between them, or a row of loops: (n, 28, 28) uint8."""
    from scipy.interpolate import CubicSpline

    t = np.linspace(0, 6, 200)
    corners = rng.uniform(-0.5, 0.5, (n, 7, 2))
    curve = CubicSpline(np.arange(7), corners, axis=1)(t)
    zigzag = np.maximum(1 - np.abs(t[:, None] - np.arange(7)), 0) @ corners  # linear interpolation as a matrix
    angle = t * rng.uniform(2.5, 5, (n, 1)) + rng.uniform(0, 2 * np.pi, (n, 1))
    circles = np.stack([np.cos(angle), np.sin(angle)], 2) * rng.uniform(0.1, 0.3, (n, 1, 2))
    way = np.stack([rng.choice((-0.2, 0.2), n), rng.normal(0, 0.07, n)], 1)  # more along the line than up or down it
    loops = circles + t[:, None] * way[:, None]
    kind = rng.integers(3, size=(n, 1, 1))
    return ink(bend(np.choose(kind, [curve, zigzag, loops]), 0.12, rng), rng)


def draw_textures(n: int, rng: np.random.Generator) -> np.ndarray:
    """Make noise, blobs, shades, stripes and blanks: (n, 28, 28) uint8."""
    from scipy import ndimage

    noise = rng.uniform(0, 1, (n, 28, 28))
    blobs = ndimage.gaussian_filter(noise, (0, 1.5, 1.5)) * 6 - 2.5
    slope_x, slope_y = rng.normal(0, 1 / 27, (2, n, 1, 1))
    shade = 0.5 + slope_x * (np.arange(28) - 13.5) + slope_y * (np.arange(28)[:, None] - 13.5)
    stripes = 0.5 + 0.5 * np.sin(shade * rng.uniform(10, 60, (n, 1, 1)))
    blank = np.zeros((n, 28, 28)) + rng.integers(2, size=(n, 1, 1)) * rng.uniform(0, 1, (n, 1, 1))  # half of them black
    kind = rng.integers(5, size=(n, 1, 1))
    return (255 * np.choose(kind, [noise, blobs, shade, stripes, blank]).clip(0, 1)).astype(np.uint8)


def spoil_digits(images: np.ndarray, labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Make n non-digits out of (m, 28, 28) uint8 images of digits and their (m,) labels: -> (n, 28, 28) uint8."""
    turns, splices, pairs = rng.multinomial(n, (0.4, 0.2, 0.4))
    turned = images[np.resize(rng.permutation(np.flatnonzero(np.isin(labels, TURNABLE))), turns)]
    turned = np.concatenate([np.rot90(turned[::2], 1, (1, 2)), np.rot90(turned[1::2], 3, (1, 2))])

    first, second = rng.integers(len(images), size=(2, 10 * n + 100))  # about one pair in eight may be spliced
    fit = np.resize(np.flatnonzero(np.isin(10 * labels[first].astype(int) + labels[second], SPLICES)), splices)
    spliced = np.concatenate([images[first[fit], :14], images[second[fit], 14:]], axis=1)

    return rng.permutation(np.concatenate([turned, spliced, squeeze(images[first[:pairs]], images[second[:pairs]])]))


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing: uint8 (n, 28, 28) -> float32 (n, 28, 28, 1) in [0, 1]
# ---------------------------------------------------------------------------------------------------------------------


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 (n, 28, 28), 0 to 255 -> float32 (n, 28, 28, 1), 0 to 1: the form in which the network takes images."""
    return images[..., np.newaxis].astype(np.float32) / 255


def split_validation(digits: Digits, validation_split: float, train_limit: int | None) -> tuple[np.ndarray, ...]:
    """The training images, their labels, and the last `validation_split` of both, held out.

    Returns:
        x_train, y_train, x_validation, y_validation: uint8 (n, 28, 28), (n,), (m, 28, 28), (m,).

    Raises:
        Failure: one of the two parts would be empty.
    """
    images, labels = digits.train_images[:train_limit], digits.train_labels[:train_limit]
    held_out = round(len(images) * validation_split)
    if not 0 < held_out < len(images):
        raise Failure(f"--validation-split {validation_split:g} of {len(images)} images leaves one part empty")
    return images[:-held_out], labels[:-held_out], images[-held_out:], labels[-held_out:]


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: a batch -> a batch, new images out of old ones
#
# Random numbers are stateless: a function of (seed, step) alone. So a run can be repeated, or taken up again, exactly.
# ---------------------------------------------------------------------------------------------------------------------


class Ranges(NamedTuple):
    """How far `augment_fast` goes: degrees, shares of the width or size, pixels."""

    rotation: float
    shift: float
    zoom: float
    shear: float
    elastic: float
    flip: bool


def augment_fast(images: tf.Tensor, ranges: Ranges, seed: tf.Tensor) -> tf.Tensor:
    """New images out of old ones: moved, bent and under another light.

    Args:
        images: float32 (n, 28, 28, 1) in [0, 1].
        ranges: how far to go.
        seed: int32 (2,); the same seed makes the same images.

    Returns:
        float32 (n, 28, 28, 1) in [0, 1].
    """
    import tensorflow as tf

    seeds = tf.random.split(seed, 3)
    if any(ranges[:4]) or ranges.flip:
        images = move(images, ranges, seeds[0])
    if ranges.elastic:
        images = distort(images, ranges.elastic, seeds[1])
    return vary_light(images, seeds[2])


def move(images: tf.Tensor, ranges: Ranges, seed: tf.Tensor) -> tf.Tensor:
    """Turn, shear, zoom, shift and mirror each image by a random affine map of its own, all in one operation."""
    import tensorflow as tf

    def signed(values: tf.Tensor, limit: float) -> tf.Tensor:
        return (2 * values - 1) * limit

    count, centre = tf.shape(images)[0], 13.5
    values = tf.unstack(tf.random.stateless_uniform([7, count], seed))
    angle = signed(values[0], math.radians(ranges.rotation))
    shear = signed(values[1], ranges.shear)
    zoom_x, zoom_y = (tf.exp(signed(value, ranges.zoom)) for value in values[2:4])
    shift_x, shift_y = (signed(value, ranges.shift * 28) for value in values[4:6])
    if ranges.flip:
        zoom_x *= tf.where(values[6] < 0.5, -1.0, 1.0)
    # Row by row the matrix rotation x shear x zoom, which takes places in the new image to places in the old one, and
    # the offset that keeps the centre where it is before the shift.
    cos, sin = tf.cos(angle), tf.sin(angle)
    xx, xy = cos * zoom_x, (shear * cos - sin) * zoom_y
    yx, yy = sin * zoom_x, (shear * sin + cos) * zoom_y
    offset_x = centre - (xx + xy) * centre + shift_x
    offset_y = centre - (yx + yy) * centre + shift_y
    zero = tf.zeros_like(angle)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([xx, xy, offset_x, yx, yy, offset_y, zero, zero], axis=1),
        output_shape=[28, 28],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )


def distort(images: tf.Tensor, pixels: float, seed: tf.Tensor) -> tf.Tensor:
    """Displace each place by a smooth random field of standard deviation about `pixels` (elastic distortion).

    After Simard, Steinkraus, Platt, "Best practices for convolutional neural networks applied to visual document
    analysis", ICDAR 2003; here the field is a coarse random grid, enlarged by cubic interpolation.
    """
    import tensorflow as tf

    count = tf.shape(images)[0]
    field = tf.random.stateless_normal([count, 7, 7, 2], seed) * pixels
    field = tf.image.resize(field, [28, 28], method="bicubic")
    places = tf.stack(tf.meshgrid(tf.range(28.0), tf.range(28.0), indexing="ij"), axis=-1)
    places = tf.clip_by_value(places + field, 0.0, 26.999)
    corner = tf.floor(places)
    down, right = tf.unstack((places - corner)[..., tf.newaxis, :], axis=-1)
    corner = tf.cast(corner, tf.int32)

    def at(row: int, column: int) -> tf.Tensor:
        return tf.gather_nd(images, corner + [row, column], batch_dims=1)

    upper = at(0, 0) * (1 - right) + at(0, 1) * right
    lower = at(1, 0) * (1 - right) + at(1, 1) * right
    return upper * (1 - down) + lower * down


def vary_light(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Half of the images out of focus, with less contrast, on a lighter ground, in shadow, as a negative, or noisy.

    A network that has only seen light ink on pure black takes any other ground for ink. The other half stays as it is,
    so that clean images are learnt no worse. A batch is in random order, so a part of it may be a slice, which costs no
    more than it must.
    """
    import tensorflow as tf

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


def augment_keras(ranges: Ranges) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The same affine ranges through Keras' `ImageDataGenerator`, an image at a time, as (images, seed) -> images."""
    import tensorflow as tf

    generator = tf.keras.preprocessing.image.ImageDataGenerator(
        rotation_range=ranges.rotation,
        width_shift_range=ranges.shift,
        height_shift_range=ranges.shift,
        zoom_range=ranges.zoom,
        shear_range=math.degrees(math.atan(ranges.shear)),
        horizontal_flip=ranges.flip,
        fill_mode="constant",
    )

    def transform(images: np.ndarray, seed: np.ndarray) -> np.ndarray:
        seeds = np.random.default_rng(seed.view(np.uint32)).integers(2**32, size=len(images))
        return np.stack([generator.random_transform(image, each) for image, each in zip(images, seeds, strict=True)])

    def augment(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(transform, [images, seed], tf.float32), images.shape)

    return augment


def augmentation(config: Config) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """What `--augment` names, as a function (images float32 (n, 28, 28, 1), seed int32 (2,)) -> images."""
    ranges = Ranges(*(getattr(config, name) for name in Ranges._fields))
    if config.augment == "none":
        return lambda images, seed: images
    if config.augment == "keras":
        return augment_keras(ranges)
    return lambda images, seed: augment_fast(images, ranges, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Model: a flag -> an uncompiled keras.Model
# ---------------------------------------------------------------------------------------------------------------------


MAX_MODEL_BYTES = 256 << 20
MAX_LAYER_SIZE = 4096
MAX_VALUES_BETWEEN_LAYERS = 1 << 18  # of one image; 500 are measured at a time
TRUSTED_MODULES = ("keras", "keras.layers", "keras.initializers", "keras.src.models.functional")
FOREIGN_CODE_LAYERS = ("Lambda", "TFSMLayer", "TorchModuleWrapper", "FlaxLayer", "JaxLayer")


def build_model(name: str, dropout: float, seed: int) -> keras.Model:
    """A network from images, float32 (n, 28, 28, 1) in [0, 1], to probabilities, float32 (n, 10)."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)  # of the first weights and of dropout
    if name == "mlp":
        body = [layers.Flatten(), *(layers.Dense(10, activation="relu") for _ in range(3))]
    else:
        body = [
            *convolution(32, 5, "valid"),  # 28 x 28 -> 24 x 24 -> 12 x 12
            *convolution(64, 3, "same"),  # -> 6 x 6
            *convolution(128, 3, "same"),  # -> 3 x 3
            layers.Flatten(),
            layers.Dense(128, use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]
    head = [layers.Dropout(dropout)] if dropout else []
    return keras.Sequential(
        [keras.Input((28, 28, 1)), *body, *head, layers.Dense(10, name="logits"), layers.Softmax()], name=name
    )


def convolution(filters: int, size: int, padding: str) -> list[keras.Layer]:
    """Convolution, max-pooling, batch normalisation, ReLU.

    Pooling comes first of the three because the others then have a quarter of the work, and no accuracy is lost.
    """
    from keras import layers

    return [
        layers.Conv2D(filters, size, padding=padding, use_bias=False),  # batch normalisation brings its own bias
        layers.MaxPooling2D(2),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
    ]


def look_five_times(model: keras.Model) -> keras.Model:
    """The same network and weights, asked about the image as it is and moved by a pixel up, down, left and right.

    The mean of the five logits is right more often than each of them. Training goes without: there, moved images come
    of themselves, and five looks would take five times as long.
    """
    import keras
    from keras import layers

    inputs = keras.Input((28, 28, 1))
    framed = layers.ZeroPadding2D(1)(inputs)
    logits = []
    for top, left in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
        outputs = layers.Cropping2D(((top, 2 - top), (left, 2 - left)))(framed)
        for layer in model.layers[:-1]:  # all but the softmax
            outputs = layer(outputs)
        logits.append(outputs)
    return keras.Model(inputs, layers.Softmax()(layers.Average()(logits)), name=model.name)


def join_models(members: Sequence[keras.Model]) -> keras.Model:
    """A committee: the mean of the members' logits, through one softmax. So it multiplies what they find probable."""
    import keras
    from keras import layers

    inputs = keras.Input((28, 28, 1))
    logits = [
        keras.Model(member.inputs, member.layers[-1].input, name=f"member_{index}")(inputs)
        for index, member in enumerate(members, start=1)
    ]
    return keras.Model(inputs, layers.Softmax()(layers.Average()(logits)), name="committee")


def divide_logits(model: keras.Model, temperature: float) -> None:
    """Fold a temperature into the weights of the layer, or of each member's layer, that gives the logits."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.Model):
            divide_logits(layer, temperature)
        elif layer.name == "logits":
            layer.set_weights([weights / temperature for weights in layer.get_weights()])


def save_model(model: keras.Model, path: Path) -> None:
    """Write the network without its optimizer: a plain Keras file of plain Keras layers."""
    import keras

    keras.Model(model.inputs, model.outputs, name=model.name).save(path)


@contextlib.contextmanager
def bounded_weights() -> Iterator[None]:
    """Let no model that is built meanwhile take more than MAX_MODEL_BYTES for its weights."""
    import keras

    add, left = keras.layers.Layer.add_weight, MAX_MODEL_BYTES

    def add_weight(layer: keras.Layer, shape: Sequence[int] | None = None, *options: Any, **more: Any) -> Any:
        nonlocal left
        left -= 4 * math.prod(shape or ())
        if left < 0:
            raise ValueError(f"its weights take more than {MAX_MODEL_BYTES >> 20} MiB")
        return add(layer, shape, *options, **more)

    keras.layers.Layer.add_weight = add_weight
    try:
        yield
    finally:
        keras.layers.Layer.add_weight = add


def load_model(path: Path) -> keras.Model:
    """Read a saved network that takes (n, 28, 28, 1) and gives (n, 10). The file is not trusted.

    Raises:
        Failure: it is no such file, is damaged, or could run code of its own.
    """
    import keras

    if not path.is_file():
        raise Failure(f"--model-file {path}: {'is no file' if path.exists() else 'does not exist'}; train first")
    try:
        check_model_file(path)
        with warnings.catch_warnings(), bounded_weights():
            warnings.simplefilter("ignore")  # what does not fit is raised as well
            model = keras.models.load_model(path, compile=False, safe_mode=True)
        for layer in model.layers:
            values = max(math.prod(output.shape[1:]) for output in keras.tree.flatten(layer.output))
            if values > MAX_VALUES_BETWEEN_LAYERS:
                raise Failure(f"--model-file {path}: makes {values} values of an image, more than this program lets it")
    except Failure:
        raise
    except Exception as error:  # zipfile, json, h5py and Keras raise a dozen kinds at damaged files
        raise Failure(f"--model-file {path}: is no readable Keras model ({describe(error)})") from error
    if (model.input_shape, model.output_shape) != ((None, 28, 28, 1), (None, 10)):
        raise Failure(
            f"--model-file {path}: takes {model.input_shape} and gives {model.output_shape}; "
            "this program needs a model that takes (None, 28, 28, 1) and gives (None, 10)"
        )
    return model


def check_model_file(path: Path) -> None:
    """Read a .keras file without building anything from it.

    Raises:
        Failure: it asks for other classes than Keras' own, for ones that run foreign code, or for too much memory.
    """
    import h5py

    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_MODEL_BYTES:
            raise Failure(f"--model-file {path}: unpacks to more than {MAX_MODEL_BYTES >> 20} MiB")
        if damaged := archive.testzip():
            raise Failure(f"--model-file {path}: is damaged (in {damaged}); copy it anew")
        description = json.loads(archive.read("config.json"))
        description.pop("compile_config", None)  # of optimizer and loss, which are not loaded
        check_model_config(description, path)
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as weights:
            sizes: list[int] = []
            weights.visititems(lambda _, item: sizes.append(getattr(item, "nbytes", 0)))
            if sum(sizes) > MAX_MODEL_BYTES:
                raise Failure(f"--model-file {path}: its weights take more than {MAX_MODEL_BYTES >> 20} MiB")


def check_model_config(node: Any, path: Path, key: str = "") -> None:
    """Walk through the description of a model.

    Raises:
        Failure: as `check_model_file`.
    """
    if isinstance(node, dict):
        module, name = node.get("module"), node.get("class_name")
        foreign = module not in TRUSTED_MODULES or name in FOREIGN_CODE_LAYERS
        if name not in (None, "__keras_tensor__") and foreign:
            raise Failure(f"--model-file {path}: uses {module}.{name}, which may run code of its own: not loaded")
        for child_key, child in node.items():
            check_model_config(child, path, child_key)
    elif isinstance(node, list):
        for child in node:
            check_model_config(child, path, key)
    elif isinstance(node, int) and node > MAX_LAYER_SIZE and key not in ("seed", "shared_object_id"):
        raise Failure(f"--model-file {path}: wants a layer with {key} {node}, more than this program builds")


# ---------------------------------------------------------------------------------------------------------------------
# Training: model + data -> history
# ---------------------------------------------------------------------------------------------------------------------

NON_DIGIT_SHARE, DRAWN_SHARE = 0.05, 0.03  # of the training images, on top of them
IMAGES_PER_CALL = 2048  # that `fit` takes before it comes back to Python: its overhead counts, and so do signals


class Steps(NamedTuple):
    """An epoch is `per_epoch` steps of `batch_size` images, taken `per_call` at a time (a divisor of `per_epoch`)."""

    batch_size: int
    per_epoch: int
    per_call: int


def count_steps(images: int, batch_size: int) -> Steps:
    """Cut `images` into whole batches, and these into whole calls; what is left over changes from epoch to epoch."""
    batch_size = min(batch_size, images)
    per_epoch = images // batch_size
    per_call = min(max(IMAGES_PER_CALL // batch_size, 1), per_epoch)
    return Steps(batch_size, per_epoch - per_epoch % per_call, per_call)


def targets_of(labels: np.ndarray, non_digits: int) -> np.ndarray:
    """One-hot rows for the labels, then uniform rows for images that are no digit: float32 (n + non_digits, 10)."""
    return np.concatenate([np.eye(10)[labels], np.full((non_digits, 10), 0.1)]).astype(np.float32)


def training_set(images: np.ndarray, labels: np.ndarray, dataset: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What the network is trained on: the training images, images that are no digit, and digits drawn from strokes.

    The non-digits are half drawn, half made of the digits themselves (outlier exposure: Hendrycks, Mazeika, Dietterich,
    "Deep anomaly detection with outlier exposure", ICLR 2019). The drawn digits, in ways that are rare in MNIST, help
    with the pictures of other people; only MNIST gets them, as other data sets may hold other signs.

    Args:
        images: uint8 (n, 28, 28).
        labels: uint8 (n,).
        dataset: its name.
        seed: of what is drawn.

    Returns:
        Images uint8 (m, 28, 28) and targets float32 (m, 10).
    """
    rng = np.random.default_rng(seed)
    count = round(NON_DIGIT_SHARE * len(images))
    non_digits = [draw_non_digits(count - count // 2, rng), spoil_digits(images, labels, count // 2, rng)]
    drawn, drawn_labels = synthetic_digits(round(DRAWN_SHARE * len(images)) if dataset == "mnist" else 0, seed)
    targets = targets_of(np.concatenate([labels, drawn_labels]), count)
    return np.concatenate([images, drawn, *non_digits]), targets


def training_batches(
    images: np.ndarray, targets: np.ndarray, config: Config, seed: int, first_epoch: int = 0
) -> tf.data.Dataset:
    """Batches of augmented images and their targets, from `first_epoch` to the last, each epoch in a new order.

    Whole batches are gathered by index from one tensor, which is several times faster than image by image.
    """
    import tensorflow as tf

    count, steps = len(images), count_steps(len(images), config.batch_size)
    used = steps.per_epoch * steps.batch_size
    images, targets = tf.constant(images), tf.constant(targets)
    augment = augmentation(config)

    def indices_of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(tf.range(count), seed=[seed, epoch])
        order = tf.reshape(order[:used], [steps.per_epoch, steps.batch_size])
        return tf.data.Dataset.from_tensor_slices((epoch * steps.per_epoch + tf.range(steps.per_epoch), order))

    def batch_of_indices(step: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch = tf.cast(tf.gather(images, indices), tf.float32)[..., tf.newaxis] / 255
        return augment(batch, tf.stack([seed, step])), tf.gather(targets, indices)

    # ImageDataGenerator draws from NumPy's one global generator, so its calls must not run side by side.
    parallel = 1 if config.augment == "keras" else os.cpu_count()
    options = tf.data.Options()
    options.autotune.enabled = False  # it finds nothing better here, and takes seconds to shut down
    epochs = tf.range(first_epoch, config.epochs)
    return (
        tf.data.Dataset.from_tensor_slices(epochs)
        .flat_map(indices_of_epoch)
        .map(batch_of_indices, num_parallel_calls=parallel, deterministic=True)
        .prefetch(steps.per_call)
        .with_options(options)
    )


def compile_model(model: keras.Model, config: Config, steps: Steps) -> None:
    """Adam under a one-cycle schedule: a linear warm-up, then a cosine down to almost nothing.

    After Smith, Topin, "Super-convergence", 2018. Labels are smoothed after Szegedy et al., "Rethinking the Inception
    architecture for computer vision", 2016; it is the largest single gain in accuracy here.
    """
    import keras
    import tensorflow as tf

    class DigitAccuracy(keras.metrics.CategoricalAccuracy):
        """Accuracy on the digits alone: a uniform target has no right answer."""

        def update_state(self, y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: None = None) -> None:
            super().update_state(y_true, y_pred, sample_weight=tf.reduce_max(y_true, axis=-1) > 0.5)

    total = config.epochs * steps.per_epoch
    warm_up = total // 5
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=config.learning_rate / 10,
        warmup_target=config.learning_rate,
        warmup_steps=warm_up,
        decay_steps=total - warm_up,
        alpha=0.01,
    )
    model.compile(
        # A shorter memory of squared gradients than the usual 0.999, for a run of a few thousand steps.
        optimizer=keras.optimizers.Adam(schedule, beta_2=0.99),
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
        metrics=[DigitAccuracy(name="accuracy")],
        # Several steps in one call fail now and then where several devices share them out.
        steps_per_execution=steps.per_call if tf.distribute.get_strategy().num_replicas_in_sync == 1 else 1,
    )


def train_model(
    model: keras.Model,
    training: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    config: Config,
    seed: int,
    checkpoint: Path,
    log: Callable[[str], None],
) -> list[dict[str, float]]:
    """Fit the model.

    Args:
        model: uncompiled; its weights change in place.
        training: images uint8 (n, 28, 28) and targets float32 (n, 10), rows that sum to 1.
        validation: likewise.
        config: of it the flags that concern augmentation and training.
        seed: of the order of the images and of the augmentation.
        checkpoint: a file to keep the state in after each epoch; where it exists, training goes on from there.
        log: takes a line an epoch.

    Returns:
        A row an epoch: epoch, loss, accuracy, val_loss, val_accuracy, learning_rate, seconds, images.

    Raises:
        Failure: the loss is no number any more.
    """
    import keras

    images, targets = training
    steps = count_steps(len(images), config.batch_size)
    compile_model(model, config, steps)
    history, best_weights = load_checkpoint(checkpoint, model)
    if history:
        log(f"goes on after epoch {len(history)}")
    clock = time.perf_counter()

    def finish_epoch(epoch: int, logs: dict[str, float]) -> None:
        nonlocal clock, best_weights
        now = time.perf_counter()
        rate = float(model.optimizer.learning_rate)
        row = {"epoch": epoch + 1, **logs, "learning_rate": rate, "seconds": round(now - clock, 3)}
        history.append(row | {"images": steps.per_epoch * steps.batch_size})
        clock = now
        if not sys.stdout.isatty():
            log(
                f"epoch {epoch + 1:>{len(str(config.epochs))}}/{config.epochs}"
                f"  loss {logs['loss']:.4f}  accuracy {logs['accuracy']:.4f}"
                f"  validation loss {logs['val_loss']:.4f}  accuracy {logs['val_accuracy']:.4f}"
                f"  {history[-1]['seconds']:.1f} s"
            )
        if not math.isfinite(logs["loss"] + logs["val_loss"]):
            raise Failure("the loss is no number any more, so nothing was saved; try a smaller --learning-rate")
        if config.patience and best_epoch(history) == epoch + 1:
            best_weights = model.get_weights()
        save_checkpoint(checkpoint, model, history, best_weights)
        model.stop_training = is_finished(history, config)

    if not is_finished(history, config):
        model.fit(
            training_batches(images, targets, config, seed, first_epoch=len(history)),
            initial_epoch=len(history),
            epochs=config.epochs,
            steps_per_epoch=steps.per_epoch,
            shuffle=False,  # the batches come shuffled
            validation_data=(normalise(validation[0]), validation[1]),
            validation_batch_size=500,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=finish_epoch)],
            verbose=1 if sys.stdout.isatty() and not config.quiet else 0,
        )
    if config.patience:
        model.set_weights(best_weights)
    return history


def best_epoch(history: list[dict[str, float]]) -> int:
    """The epoch with the smallest validation loss, counted from 1."""
    return min(history, key=lambda row: row["val_loss"])["epoch"]


def is_finished(history: list[dict[str, float]], config: Config) -> bool:
    """Whether all epochs are done, or `--patience` is at its end.

    Keras' EarlyStopping decides the same, but knows nothing of the epochs before a run was taken up again.
    """
    tired = bool(config.patience and history) and len(history) - best_epoch(history) >= config.patience
    return tired or len(history) == config.epochs


def save_checkpoint(
    path: Path, model: keras.Model, history: list[dict[str, float]], best_weights: list[np.ndarray]
) -> None:
    """Keep all that the next epoch depends on, in one file, renamed into place once it is whole.

    Keras' own checkpoints leave out the state of dropout's random numbers, so that a run taken up again would differ.
    """
    state = {f"state{index}": variable.numpy() for index, variable in enumerate(variables_of(model))}
    best = {f"best{index}": weights for index, weights in enumerate(best_weights)}
    temporary = path.with_suffix(".part")
    temporary.unlink(missing_ok=True)  # it may be a link to elsewhere
    with open(temporary, "wb") as stream:
        np.savez(stream, history=np.array(json.dumps(history)), **state, **best)
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: keras.Model) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """Put the state kept in `path` into a compiled model; return the history and the best weights so far.

    Both are empty, and the model stays as it is, where there is no such file. A damaged one is set aside.
    """
    model.optimizer.build(model.trainable_variables)
    if not path.exists():
        return [], []
    variables = variables_of(model)
    try:
        with np.load(path, allow_pickle=False) as archive:
            state = [archive[f"state{index}"] for index in range(len(variables))]
            best_count = sum(name.startswith("best") for name in archive.files)
            best_weights = [archive[f"best{index}"] for index in range(best_count)]
            history = json.loads(str(archive["history"]))
        fits = [
            *zip(variables, state, strict=True),
            *zip(model.weights if best_weights else [], best_weights, strict=True),
        ]
        if any(variable.shape != value.shape for variable, value in fits):
            raise ValueError("it belongs to another network")
        if history:
            best_epoch(history)
    except Exception as error:  # zipfile, NumPy and json raise a dozen kinds at damaged files
        damaged = path.with_suffix(".damaged")
        os.replace(path, damaged)
        warn(f"WARNING: the checkpoint was damaged ({describe(error)}) and is set aside as {damaged}; starting anew")
        return [], []
    for variable, value in zip(variables, state, strict=True):
        variable.assign(value)
    return history, best_weights


def variables_of(model: keras.Model) -> list[Any]:
    """Weights, moving averages, random states and the optimizer's memory, always in the same order."""
    return [*model.variables, *model.optimizer.variables]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: model + images + labels -> an Evaluation, in plain NumPy; calibration
# ---------------------------------------------------------------------------------------------------------------------

CALIBRATION_BINS = 15


class Evaluation(NamedTuple):
    """What a model says of labelled images: labels uint8 (n,), probabilities float64 (n, 10), rows sum to 1."""

    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """The most probable digit of each image, int64 (n,)."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidences(self) -> np.ndarray:
        """The probability of that digit, float64 (n,)."""
        return self.probabilities.max(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Whether that digit is the label, bool (n,)."""
        return self.predictions == self.labels


def predict_probabilities(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """uint8 (n, 28, 28) -> float64 (n, 10), rows sum to 1.

    Raises:
        Failure: what the model gives are no probabilities.
    """
    probabilities = model.predict(normalise(images), batch_size=500, verbose=0).astype(np.float64)
    if not (probabilities.min() >= 0 and np.allclose(probabilities.sum(axis=1), 1, atol=1e-3)):  # nor is NaN
        raise Failure("the model gives no probabilities (ten numbers from 0 on that add up to 1); train it anew")
    return probabilities


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, 1e-30))  # where float32 has rounded to 0


def cross_entropy(evaluation: Evaluation) -> float:
    """Mean of -ln(probability of the label), in nats."""
    return float(
        -log_probabilities(evaluation.probabilities)[np.arange(len(evaluation.labels)), evaluation.labels].mean()
    )


def confusion_matrix(evaluation: Evaluation) -> np.ndarray:
    """int64 (10, 10): rows are labels, columns predictions."""
    matrix = np.zeros((10, 10), np.int64)
    np.add.at(matrix, (evaluation.labels, evaluation.predictions), 1)
    return matrix


def per_digit(matrix: np.ndarray) -> list[dict[str, float]]:
    """Precision, recall and F1 of each digit, from a confusion matrix; 0 where a ratio has nothing to count."""
    hits = matrix.diagonal()
    precision = hits / np.maximum(matrix.sum(axis=0), 1)
    recall = hits / np.maximum(matrix.sum(axis=1), 1)
    f1 = 2 * hits / np.maximum(matrix.sum(axis=0) + matrix.sum(axis=1), 1)
    return [
        {"digit": digit, "precision": precision[digit], "recall": recall[digit], "f1": f1[digit]} for digit in range(10)
    ]


def calibration_bins(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per bin of confidence, (15,) each: how many images, their mean confidence, and the share that is right."""
    bins = np.minimum((evaluation.confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    confidence = np.bincount(bins, evaluation.confidences, CALIBRATION_BINS) / np.maximum(counts, 1)
    accuracy = np.bincount(bins, evaluation.correct, CALIBRATION_BINS) / np.maximum(counts, 1)
    return counts, confidence, accuracy


def expected_calibration_error(evaluation: Evaluation) -> float:
    """Mean distance between confidence and accuracy over the images, by bins of confidence.

    After Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    counts, confidence, accuracy = calibration_bins(evaluation)
    return float(counts @ np.abs(confidence - accuracy) / counts.sum())


def fit_temperature(evaluation: Evaluation) -> float:
    """The temperature T for which softmax(logits / T) has the smallest cross-entropy (Guo et al., 2017).

    Log-probabilities serve as the logits: they differ by a constant in each row, which softmax does not see.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import softmax

    logits = log_probabilities(evaluation.probabilities)

    def loss(log_temperature: float) -> float:
        return cross_entropy(evaluation._replace(probabilities=softmax(logits / math.exp(log_temperature), axis=1)))

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


def calibrate(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> tuple[float, Evaluation]:
    """Make the model's probabilities honest: fit a temperature on these held-out images and fold it into the weights.

    Returns:
        The temperature, and what the calibrated model says of these images.
    """
    from scipy.special import softmax

    raw = Evaluation(labels, predict_probabilities(model, images))
    temperature = fit_temperature(raw)
    divide_logits(model, temperature)
    return temperature, raw._replace(probabilities=softmax(log_probabilities(raw.probabilities) / temperature, axis=1))


def digit_scores(probabilities: np.ndarray) -> np.ndarray:
    """How much like a digit each image is, in nats, float64 (n,): its largest logit above the mean of all ten.

    It is 0 where all ten digits are equally probable, which is what the network learns to say of what is no digit.
    """
    logits = log_probabilities(probabilities)
    return logits.max(axis=1) - logits.mean(axis=1)


def rejection_threshold(probabilities: np.ndarray) -> float:
    """The score that `ACCEPTED_SHARE` of these digits reach."""
    return float(np.quantile(digit_scores(probabilities), 1 - ACCEPTED_SHARE))


# ---------------------------------------------------------------------------------------------------------------------
# Your own images: a file -> a 28 x 28 digit as MNIST would have made it -> digit, confidence, verdict
# ---------------------------------------------------------------------------------------------------------------------

PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
MAX_PIXELS = 80_000_000  # more is refused, on the word of the header, before a pixel is decoded
MAX_SIDE = 1000  # px; larger pictures are shrunk to this as early as the format allows
COARSE_SIDE = 100  # px; the long side of the small copy on which light and paper are judged
NARROW = 9  # px of the small copy: no stroke but a marker's is wider, and light changes little over it
BOX_SIDE, DIGIT_SIDE = 20, 28  # MNIST: the ink fills a 20 x 20 box, centred by mass in 28 x 28
FINE = 6  # strokes are thickened at this many pixels to one of the 28 x 28
MIN_STROKE = 2.3  # px of 28: thinner strokes are thickened to this, about what MNIST's pens drew
MIN_CONTRAST = 0.12  # ink absorbs at least this share of the paper's light; less is a blank sheet


def pillow() -> ModuleType:
    """Pillow's Image module, imported where it is first needed."""
    from PIL import Image

    return Image


def read_picture(path: Path) -> np.ndarray:
    """Read a picture as float32 (height, width) grey in [0, 1], upright, on white, its long side at most MAX_SIDE.

    Of an animation the first frame is read. Raises ValueError, in one line that does not name the path, where the
    picture cannot be read: missing, empty, truncated, no picture, or more than MAX_PIXELS.
    """
    # What Pillow warns of is raised here, or harmless. No catch_warnings: threads would undo one another's filters.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    image_module = pillow()
    if not os.path.isfile(path):  # Path.is_file raises where a folder on the way may not be entered
        raise ValueError("is no file" if os.path.exists(path) else "no such file, or none that may be read")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    too_large = f"more than {MAX_PIXELS // 1_000_000} megapixels"
    try:
        with image_module.open(path, formats=PICTURE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise image_module.DecompressionBombError(too_large)
            return grey_levels(image)
    except image_module.DecompressionBombError:
        raise ValueError(too_large) from None
    except image_module.UnidentifiedImageError:
        raise ValueError(f"not a picture ({', '.join(PICTURE_FORMATS)})") from None
    except Exception as error:  # hostile bytes make the decoders raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"damaged picture: {' '.join(reason.split())}") from error


def grey_levels(image: Image) -> np.ndarray:
    """Decode an opened Pillow image of any mode: float32 (height, width) in [0, 1]. Raises whatever Pillow raises."""
    from PIL import ImageOps

    image.draft("L", (MAX_SIDE, MAX_SIDE))  # JPEG only: decodes at 1/2, 1/4 or 1/8 of the size, in grey
    image.load()
    deep = image.mode.startswith(("I", "F"))  # 16 or 32 bits; converting these to "L" would clip, not scale
    if image.mode in ("L", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:  # no others can be shrunk yet
        image.thumbnail((MAX_SIDE, MAX_SIDE), reducing_gap=2.0)
    grey = image.convert("F" if deep else "LA" if image.has_transparency_data else "L")
    grey.thumbnail((MAX_SIDE, MAX_SIDE), reducing_gap=2.0)
    grey = ImageOps.exif_transpose(grey)
    levels = np.asarray(grey, np.float32)
    if grey.mode == "LA":  # on white
        return 1 - (1 - levels[..., 0] / 255) * levels[..., 1] / 255
    if not deep:
        return levels / 255
    levels = np.nan_to_num(levels, posinf=0, neginf=0).clip(0)
    brightest = levels.max()  # a TIFF does not say which of its numbers is white
    white = 65535 if image.mode.startswith("I;16") or brightest > 255 else 255 if brightest > 1 else 1
    return levels / np.float32(max(white, brightest))


def scaled(levels: np.ndarray, long_side: float) -> np.ndarray:
    """A float32 copy of a 2-D array with a long side of so many pixels, proportions kept."""
    return resized(levels, *(max(1, round(side * long_side / max(levels.shape))) for side in levels.shape))


def resized(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    """A float32 (height, width) copy of a 2-D array, each pixel the mean of what it covers when it shrinks."""
    return np.asarray(pillow().fromarray(levels).resize((width, height), pillow().Resampling.BILINEAR))


def coarse(levels: np.ndarray) -> np.ndarray:
    """A copy with a long side of at most COARSE_SIDE: noise and thin strokes fade, light and paper stay."""
    return scaled(levels, min(COARSE_SIDE, max(levels.shape)))


def border_of(levels: np.ndarray) -> np.ndarray:
    """The outermost rows and columns of a 2-D array, as one row."""
    return np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])


def hugs_border(labels: np.ndarray, count: int) -> np.ndarray:
    """Which of the parts 1..count lie along the picture's border, as a table's edge does: bool (count,)."""
    return np.bincount(border_of(labels), minlength=count + 1)[1:] > 0.3 * min(labels.shape)


def ink_is_dark(grey: np.ndarray) -> bool:
    """Tell dark ink on light paper from light ink on dark, by the skew of the levels about those of the paper.

    Two views of it are added up. Where strokes are thick, paper is what most of the picture and most of its border
    are. Where light is uneven, paper is what a narrow blur leaves; thin strokes stand out from it to one side.
    """
    from scipy import ndimage

    small = coarse(grey).astype(np.float64)
    paper = np.median(np.concatenate([small.ravel(), np.resize(border_of(small), small.size)]))
    blurred = ndimage.gaussian_filter(small, max(1.5, max(small.shape) / 24))
    skews = [(a * a * a).mean() / ((a * a).mean() ** 1.5 + 1e-9) for a in (small - paper, small - blurred)]
    return sum(skews) <= 0


def paper_under(dark: np.ndarray) -> np.ndarray:
    """Estimate the bare paper's brightness everywhere, in a picture with dark ink: float32, same shape.

    A closing fills dark things narrower than its window with the paper around them. A narrow window follows the light,
    but leaves thick strokes; these are painted over with the nearest paper first.
    """
    from scipy import ndimage

    small = coarse(dark)
    closed = ndimage.grey_closing(small, size=NARROW)
    thick = thick_strokes(closed)
    if thick.any() and not thick.all():
        nearest = ndimage.distance_transform_edt(thick, return_distances=False, return_indices=True)
        closed = ndimage.grey_closing(small[tuple(nearest)], size=NARROW)
    return resized(ndimage.gaussian_filter(closed, max(small.shape) / 100), *dark.shape)


def thick_strokes(closed: np.ndarray) -> np.ndarray:
    """Mark what is ink among the dark things of a small picture without its thin strokes: bool, same shape.

    A closing with a wide window fills thick strokes, but shadows too. Ink is what is deeper than a shadow, or has
    sharp edges and does not hug the border.
    """
    from scipy import ndimage

    paper = ndimage.grey_closing(closed, size=max(NARROW, max(closed.shape) // 2))
    depth = (paper - closed) / np.maximum(paper, 0.1)
    labels, count = ndimage.label(depth > 0.1)
    parts = np.arange(1, count + 1)
    outline = np.where(ndimage.binary_erosion(labels > 0, border_value=1), 0, labels)
    steps = np.asarray(ndimage.mean(ndimage.morphological_gradient(closed, 3), outline, parts))
    sharp = steps > 0.4 * np.asarray(ndimage.mean(depth, labels, parts))
    ink = (depth > 0.5) | np.concatenate([[False], sharp & ~hugs_border(labels, count)])[labels]
    return ndimage.binary_dilation(ink, iterations=2)


def without_ruled_lines(ink: np.ndarray, blank: float) -> np.ndarray:
    """Take out the thin near-horizontal lines that cross the whole picture, except where a stroke crosses them.

    ink: float32 (height, width); blank: the most that bare paper reaches. Of all slopes up to 1 in 4 the one is taken
    along which ink lines up best.
    """
    from scipy import ndimage

    height, width = ink.shape
    inked = ndimage.binary_dilation(ink > blank, np.ones((3, 1)))
    if min(ink.shape) < 64 or inked.any(0).mean() < 0.8 or inked.mean() > 0.5:  # nothing crosses it, or no drawing
        return ink

    def line_of(rows: np.ndarray, columns: np.ndarray, slope: float) -> np.ndarray:
        return np.round(rows + slope * (width / 2 - columns)).astype(int) + width  # the row at half width, + width

    rows, columns = np.nonzero(inked)
    lined_up = {
        slope: np.bincount(line_of(rows, columns, slope), minlength=2 * width + height)
        for slope in np.linspace(-0.25, 0.25, 101)
    }
    slope = max(lined_up, key=lambda slope: np.square(lined_up[slope]).sum())
    line = line_of(*np.indices(ink.shape), slope)
    visible = np.bincount(line.ravel(), minlength=2 * width + height)  # lines may leave by the top and the bottom
    ruled = (lined_up[slope] > 0.8 * visible) & (visible > 0.2 * width)
    if not ruled.any():
        return ink
    thickest = max(2, round(0.008 * min(ink.shape)))
    without = ndimage.grey_opening(ink, size=(2 * thickest + 1, 1))  # only what is taller than a line
    return np.where(ndimage.binary_dilation(ruled, iterations=2)[line], without, ink)


def is_only_light(grey: np.ndarray) -> bool:
    """Whether a small picture is nothing but a slope or a spot of light: a quadratic in x and y explains it all."""
    if max(grey.shape) > COARSE_SIDE:
        return False  # in a large one, light changes too slowly to be taken for ink
    y, x = np.indices(grey.shape) / COARSE_SIDE
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    solution = np.linalg.lstsq(terms, grey.ravel(), rcond=None)[0]
    return bool(np.abs(terms @ solution - grey.ravel()).max() < MIN_CONTRAST / 2)


def find_ink(grey: np.ndarray) -> np.ndarray:
    """Find what is drawn in a grey picture: float32 (height, width) in [0, 1], 0 where there is only paper."""
    from scipy import ndimage

    if is_only_light(grey):
        return np.zeros_like(grey)
    dark = grey if ink_is_dark(grey) else 1 - grey
    paper = paper_under(dark)
    ink = (paper - dark) / np.maximum(paper, 0.25)  # the share of light absorbed: the same in light and shade
    low, middle = np.quantile(ink, [0.2, 0.4])  # both are paper, unless the picture is mostly ink
    blank = max(MIN_CONTRAST / 2, middle + 9 * (middle - low))  # what noise does not reach
    ink = without_ruled_lines(without_ruled_lines(ink, blank).T, blank).T
    kept = parts_of_the_drawing(ink, *ndimage.label(ink > blank, np.ones((3, 3))))
    full = np.quantile(ink[kept], 0.75) if kept.any() else 0
    faintest = MIN_CONTRAST * np.sqrt(max(1, COARSE_SIDE / max(ink.shape)))  # light is less even in a tiny picture
    if full < faintest:
        return np.zeros_like(ink)
    drawn = ndimage.binary_propagation(kept & (ink > 0.5 * full), mask=ink > max(0.25 * full, blank))
    drawn = ndimage.binary_dilation(drawn, np.ones((3, 3)))  # with the soft edges of its strokes
    return np.where(drawn, np.clip((ink - middle) / (0.95 * full), 0, 1), 0).astype(np.float32)


def parts_of_the_drawing(ink: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Choose the connected parts that belong to the drawing: a bool mask. labels: int, 0 paper, 1..count the parts.

    Dropped are things that hug the border when something else is there, and specks: tiny parts, and small ones far
    from the large. When that would drop most of the ink, the picture is no drawing but a texture, and stays one.
    """
    from scipy import ndimage

    nothing = np.zeros(labels.shape, bool)
    if count == 0:
        return nothing
    area = np.bincount(labels.ravel())[1:]
    mass = np.bincount(labels.ravel(), ink.ravel())[1:]
    boxes = np.array([[r.start, c.start, r.stop, c.stop] for r, c in ndimage.find_objects(labels)])
    starts, stops = boxes[:, :2], boxes[:, 2:]
    extent = (stops - starts).max(1)
    if extent.max() < max(4, 0.05 * max(ink.shape)):  # dust or noise, on a blank sheet
        return nothing
    hugging = hugs_border(labels, count)
    if (~hugging & (extent > max(4, 0.1 * min(ink.shape))) & (mass > 0.005 * mass.max())).any():
        mass = np.where(hugging, 0, mass)
    large = mass > 0.15 * mass.max()
    top_left, bottom_right = starts[large].min(0), stops[large].max(0)
    gap = np.maximum(top_left - stops, starts - bottom_right).max(1)
    near = gap < 0.5 * (bottom_right - top_left).max()
    kept = large | (near & (mass > 0.01 * mass.max()) & (area > 2))
    if mass[kept].sum() < 0.5 * mass.sum():
        kept = mass > 0
    return np.concatenate([[False], kept])[labels]


def picture_to_digit(grey: np.ndarray) -> np.ndarray:
    """Make of a grey picture what MNIST would have made of it: uint8 (28, 28), light on black; all 0 if blank."""
    ink = find_ink(grey)
    rows, columns = np.flatnonzero((ink > 0.15).any(1)), np.flatnonzero((ink > 0.15).any(0))
    if rows.size == 0:
        return np.zeros((DIGIT_SIDE, DIGIT_SIDE), np.uint8)
    drawn = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return centred_by_mass(fitted(drawn))


def stroke_width(ink: np.ndarray) -> float:
    """The mean width of strokes in pixels: across a stroke the mean distance to its edge is a quarter of its width."""
    from scipy import ndimage

    inside = np.pad(ink > 0.5, 1)
    distances = ndimage.distance_transform_edt(inside)[inside] - 0.5
    return 4 * float(distances.mean()) if distances.size else 0.0


def fitted(drawn: np.ndarray) -> np.ndarray:
    """Scale cropped ink so that it fills a 20 x 20 box, proportions kept, with no stroke thinner than MIN_STROKE.

    Returns float (height, width) in [0, 1]; around thickened ink there are a few empty rows and columns.
    """
    from scipy import ndimage

    if max(drawn.shape) == BOX_SIDE:  # as MNIST's own are: left as it is
        return drawn
    shrunk = max(drawn.shape) // (BOX_SIDE * FINE)
    if shrunk > 1:  # a hair-thin stroke would fade away: let it fill one fine pixel
        drawn = ndimage.grey_dilation(drawn, size=(shrunk, shrunk))
    missing = MIN_STROKE - stroke_width(scaled(drawn, BOX_SIDE * FINE)) / FINE  # px of 28
    if missing <= 0:
        return scaled(drawn, BOX_SIDE)
    fine = np.pad(scaled(drawn, (BOX_SIDE - missing) * FINE), 2 * FINE)
    outside = ndimage.distance_transform_edt(fine < 0.5)
    fine = np.maximum(fine, np.clip(FINE * missing / 2 + 1 - outside, 0, 1))
    fine = np.pad(fine, [(0, -side % FINE) for side in fine.shape])
    height, width = fine.shape
    return fine.reshape(height // FINE, FINE, width // FINE, FINE).mean((1, 3))


def centred_by_mass(box: np.ndarray) -> np.ndarray:
    """Place ink with its centre of mass at pixel (14, 14) of 28 x 28, where MNIST has it to half a pixel: uint8."""
    from scipy import ndimage

    canvas = np.zeros((3 * DIGIT_SIDE, 3 * DIGIT_SIDE))
    row, column = (round(DIGIT_SIDE * 1.5 - centre) for centre in ndimage.center_of_mass(box))
    canvas[row : row + box.shape[0], column : column + box.shape[1]] = box
    middle = slice(DIGIT_SIDE, 2 * DIGIT_SIDE)
    return np.round(255 * canvas[middle, middle].clip(0, 1)).astype(np.uint8)


PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PICTURES_AT_ONCE = 2  # decoded side by side: bounds the memory to that of two photos
PICTURES_PER_BATCH = 256
USUAL_THRESHOLD = 4.5  # for a model whose own run, with its threshold, is not known


class Prediction(NamedTuple):
    """What the network makes of one picture; probabilities float64 (10,), score as in `digit_scores`."""

    digit: int
    confidence: float
    score: float
    verdict: str  # "digit" or "not-a-digit"
    probabilities: np.ndarray


def list_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and of the folders among them all pictures, in the order of their names.

    Raises:
        Failure: a folder cannot be read, or holds no picture.
    """
    pictures = []
    for path in paths:
        if not os.path.isdir(path):  # Path.is_dir raises where a folder on the way may not be entered
            pictures.append(path)
            continue
        try:
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_ENDINGS)
        except OSError as error:
            raise Failure(f"--predict {path}: {describe(error)}") from error
        if not inside:
            raise Failure(f"--predict {path}: holds no picture ({', '.join(PICTURE_ENDINGS)})")
        pictures += inside
    return pictures


def read_digit(path: Path) -> np.ndarray | str:
    """A picture file -> uint8 (28, 28), or what is wrong with it."""
    try:
        return picture_to_digit(read_picture(path))
    except ValueError as error:
        return describe(error)


def recognise(model: keras.Model, digits: Sequence[np.ndarray], threshold: float) -> list[Prediction]:
    """What the network makes of uint8 (28, 28) digits; those that score below `threshold` are none."""
    if not digits:
        return []
    probabilities = predict_probabilities(model, np.stack(digits))
    scores = digit_scores(probabilities) * np.any(digits, axis=(1, 2))  # where there is no ink there is no digit
    return [
        Prediction(int(row.argmax()), float(row.max()), float(score), verdict, row)
        for row, score in zip(probabilities, scores, strict=True)
        for verdict in ["digit" if score >= threshold else "not-a-digit"]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Plots: plain arrays -> one PNG each
# ---------------------------------------------------------------------------------------------------------------------

INK, MUTED, BLUE, ORANGE, RED = "#1a1a1a", "#6b6b6b", "#1f6fb4", "#e07b1a", "#c0392b"


def new_figure(width: float, height: float, title: str, subtitle: str = "") -> Figure:
    """An empty figure, inches, with a headline and a line of explanation under it. No display is ever needed."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {
            "font.size": 11,
            "text.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
        }
    )
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 1 - 0.75 / height))
    figure.text(0.18 / width, 1 - 0.12 / height, title, fontsize=15, fontweight="bold", va="top")
    figure.text(0.18 / width, 1 - 0.46 / height, subtitle, fontsize=10.5, color=MUTED, va="top")
    return figure


def place_panels(figure: Figure, rows: int, columns: int, **options: Any) -> np.ndarray:
    """A grid of axes, (rows, columns), under the headline; at fixed places, which is much faster than to fit them."""
    figure.set_layout_engine("none")
    width, height = figure.get_size_inches()
    margins = {"left": 0.2 / width, "right": 1 - 0.2 / width, "bottom": 0.3 / height, "top": 1 - 1.0 / height}
    return figure.subplots(rows, columns, squeeze=False, gridspec_kw=margins | options)


def show_image(axes: Axes, image: np.ndarray, title: str = "", color: str = INK, **options: Any) -> None:
    """Draw one image, with a title above it and without an axis."""
    options = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": "nearest"} | options
    axes.imshow(image, **options)
    axes.set_title(title, color=color, fontsize=10, loc="center", pad=3)
    axes.set_axis_off()


def plot_samples(path: Path, images: np.ndarray, labels: np.ndarray, dataset: str) -> None:
    """Twelve images of each digit, a row a digit."""
    figure = new_figure(
        9.2, 8.4, f"What the data looks like: {dataset}", "Each row: twelve training images of one digit."
    )
    sheet = np.zeros((10, 12, 30, 30), np.uint8)
    for digit in range(10):
        chosen = images[labels == digit][:12]
        sheet[digit, : len(chosen), 1:-1, 1:-1] = chosen
    axes = figure.subplots()
    axes.imshow(
        sheet.transpose(0, 2, 1, 3).reshape(300, 360),
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest",
        aspect="equal",
    )
    axes.set_yticks(np.arange(10) * 30 + 15, [str(digit) for digit in range(10)], fontsize=13)
    axes.set_ylabel("label")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def plot_pixels(path: Path, image: np.ndarray, label: int) -> None:
    """What an image is to a computer: numbers; in grey one number a pixel, in colour three."""
    figure = new_figure(
        13,
        8.6,
        f"What a computer sees: an image of a {label} is 28 x 28 numbers",
        "Left: each pixel's brightness, 0 (black) to 255 (white). Right: grey needs one number a pixel, colour three.",
    )
    grid = figure.add_gridspec(3, 5, width_ratios=[1, 1, 1, 0.75, 0.75])
    numbers = figure.add_subplot(grid[:, :3])
    show_image(numbers, image)
    for row, column in np.ndindex(28, 28):
        value = int(image[row, column])
        shade = "black" if value > 140 else "#8f8f8f" if value == 0 else "white"
        numbers.text(column, row, str(value), ha="center", va="center", fontsize=6.2, color=shade)

    paper, ink = np.array([20, 40, 90]), np.array([255, 190, 60])
    share = image[..., np.newaxis] / 255
    colour = (paper + share * (ink - paper)).astype(np.uint8)
    show_image(figure.add_subplot(grid[0, 3]), image, "grey: 28 x 28 x 1")
    show_image(figure.add_subplot(grid[0, 4]), colour, "colour: 28 x 28 x 3", cmap=None)
    for place, channel, name in zip(
        (grid[1, 3], grid[1, 4], grid[2, 3]), range(3), ("red", "green", "blue"), strict=True
    ):
        title = f"{name} channel, {colour[..., channel].min()} to {colour[..., channel].max()}"
        alone = np.zeros_like(colour)
        alone[..., channel] = colour[..., channel]
        show_image(figure.add_subplot(place), alone, title, cmap=None)
    note = figure.add_subplot(grid[2, 4])
    note.set_axis_off()
    note.text(
        0, 0.5, "The network\ntakes the grey one,\ndivided by 255:\n784 numbers\nfrom 0 to 1.", va="center", fontsize=11
    )
    figure.savefig(path)


def plot_augmentation(path: Path, originals: np.ndarray, variants: np.ndarray, how: str) -> None:
    """Originals uint8 (n, 28, 28) in the first column, and what augmentation makes of them, (n, m, 28, 28), beside."""
    count, versions = variants.shape[:2]
    figure = new_figure(
        1.0 * (versions + 1) + 0.4,
        1.0 * count + 1.0,
        "New training images out of old ones",
        f"Left: the original. Right: what the network is shown instead, another each time (--augment {how}).",
    )
    axes = figure.subplots(1, 2, width_ratios=[1, versions])
    show_image(axes[0], np.concatenate([np.pad(image, 1) for image in originals]), "original", aspect="equal")
    sheet = [np.concatenate([np.pad(image, 1) for image in row], axis=1) for row in variants]
    show_image(axes[1], np.concatenate(sheet), "augmented", aspect="equal")
    figure.savefig(path)


def plot_training_curves(path: Path, history: list[dict[str, float]], dataset: str) -> None:
    """Loss, accuracy and learning rate over the epochs; a line for each seed."""
    seeds = sorted({row["seed"] for row in history})
    figure = new_figure(
        12,
        4.6,
        f"Training on {dataset}: {len(history) // len(seeds)} epochs" + f", {len(seeds)} networks" * (len(seeds) > 1),
        "Validation looks better than training, which is measured on augmented images while the weights still change.",
    )
    panels = (
        ("loss (with label smoothing)", 1, [("loss", "training", ORANGE), ("val_loss", "validation", BLUE)]),
        ("accuracy in %", 100, [("accuracy", "training", ORANGE), ("val_accuracy", "validation", BLUE)]),
        ("learning rate at the end of the epoch", 1, [("learning_rate", "", MUTED)]),
    )
    for axes, (title, scale, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for key, label, colour in lines:
            for seed in seeds:
                rows = [row for row in history if row["seed"] == seed]
                values = [scale * row[key] for row in rows]
                axes.plot([row["epoch"] for row in rows], values, "o-", color=colour, label=label, markersize=4)
                label = ""  # one entry in the legend stands for all seeds
        if lines[0][1]:
            axes.legend(frameon=False)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    figure.savefig(path)


def plot_confusion_matrix(path: Path, matrix: np.ndarray, title: str) -> None:
    """Counts and, beside them, rates: which digit is taken for which."""
    figure = new_figure(
        13.4,
        6.6,
        title,
        "Rows: the label. Columns: what the network said. All but the diagonal are errors, the redder the more.",
    )
    rates = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    panels = zip(figure.subplots(1, 2), (matrix, rates), ("images", "% of the label's images"), strict=True)
    off_diagonal = ~np.eye(10, dtype=bool)
    for axes, values, name in panels:
        errors = np.where(off_diagonal, values, 0)
        axes.imshow(errors, cmap="Reds", vmin=0, vmax=max(errors.max() * 1.6, 1e-9))
        for row, column in np.ndindex(10, 10):
            value = values[row, column]
            text = "" if value == 0 else f"{value:.2f}" if name != "images" else str(value)
            weight = "bold" if row == column else "normal"
            axes.text(column, row, text, ha="center", va="center", fontsize=9.5, fontweight=weight)
        axes.set_xticks(range(10))
        axes.set_yticks(range(10))
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        axes.set_title(name)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.savefig(path)


def plot_predictions(path: Path, images: np.ndarray, evaluation: Evaluation, title: str) -> None:
    """The first two test images of each digit, with the probability of each digit as a bar."""
    chosen = np.concatenate([np.flatnonzero(evaluation.labels == digit)[:2] for digit in range(10)])
    figure = new_figure(
        12.5,
        8.6,
        title,
        "Test images, and how probable the network finds each digit. Blue: the label. Orange: another digit.",
    )
    panels = place_panels(figure, 5, 8, width_ratios=[1, 1.5] * 4, wspace=0.08, hspace=0.32)
    for axes in panels.flat[2 * len(chosen) :]:
        axes.set_axis_off()
    for (picture, bars), index in zip(panels.reshape(-1, 2), chosen, strict=False):
        label, prediction = evaluation.labels[index], evaluation.predictions[index]
        show_image(picture, images[index], f"label {label}")
        draw_probabilities(bars, evaluation.probabilities[index], BLUE, highlight=label)
        verdict = f"says {prediction}, {100 * evaluation.confidences[index]:.1f}%"
        bars.set_title(verdict, fontsize=10, loc="center", color=INK if prediction == label else RED, pad=3)
    figure.savefig(path)


def draw_probabilities(axes: Axes, probabilities: np.ndarray, colour: str, highlight: int) -> None:
    """Ten bars, (10,) probabilities; the highlighted digit in `colour`."""
    axes.bar(range(10), probabilities, color=[colour if digit == highlight else ORANGE for digit in range(10)])
    axes.set_ylim(0, 1)
    axes.set_xticks(range(10), [str(digit) for digit in range(10)], fontsize=8)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def plot_external_predictions(
    path: Path,
    names: Sequence[str],
    pictures: Sequence[np.ndarray],
    digits: np.ndarray,
    predictions: Sequence[Prediction],
) -> None:
    """Up to forty pictures, each with the 28 x 28 digit that the network saw of it, and the probabilities.

    Args:
        path: the PNG to write.
        names: of the picture files.
        pictures: float (height, width) in [0, 1] each.
        digits: uint8 (n, 28, 28).
        predictions: what the network made of them.
    """
    across = min(len(names), 4)
    rows = max(math.ceil(len(names) / 4), 1)
    width, height = 3.55, 1.62  # of a file's place; its two images are 1 x 1, its bars 1.1 wide and 1 high
    figure = new_figure(
        max(3.3 * across, 6.6) + 0.4,
        1.62 * rows + 1.0,
        "Your own pictures",
        "The picture, the 28 x 28 digit that the network saw, and how probable it finds each digit.",
    )
    figure.set_layout_engine("none")  # one pair of axes takes a tenth of the time of three for each picture
    axes = figure.add_axes((0.02, 0.0, 0.96, 1 - 0.85 / (1.62 * rows + 1.0)))
    axes.set_axis_off()
    for index, (name, picture, digit, prediction) in enumerate(zip(names, pictures, digits, predictions, strict=True)):
        left, top = width * (index % 4), -height * (index // 4)
        tall, wide = np.array(picture.shape) / max(picture.shape)
        images = (
            (picture, (left + 0.5 - wide / 2, left + 0.5 + wide / 2, top - 0.5 - tall / 2, top - 0.5 + tall / 2), 1),
            (digit, (left + 1.08, left + 2.08, top - 1, top), 255),
        )
        for image, extent, white in images:
            axes.imshow(image, cmap="gray", vmin=0, vmax=white, extent=extent, interpolation="nearest")
        accepted = prediction.verdict == "digit"
        places = left + 2.2 + 0.115 * np.arange(10)
        colours = [(BLUE if accepted else MUTED) if each == prediction.digit else ORANGE for each in range(10)]
        axes.bar(places, 0.88 * prediction.probabilities, 0.1, top - 0.9, color=colours)
        axes.plot([left + 2.14, left + 3.3], [top - 0.9] * 2, color=MUTED, linewidth=0.6)
        for each, place in enumerate(places):
            axes.text(place, top - 0.92, str(each), fontsize=7, ha="center", va="top", color=MUTED)
        says = f"{prediction.digit}, {100 * prediction.confidence:.1f}%" if accepted else "not a digit"
        short = name if len(name) <= 26 else name[:12] + "..." + name[-11:]
        axes.text(left, top + 0.08, short, fontsize=8.5, va="bottom", parse_math=False)
        axes.text(
            left + 3.3,
            top + 0.08,
            says,
            fontsize=9.5,
            ha="right",
            va="bottom",
            color=INK if accepted else RED,
            fontweight="bold",
        )
    axes.set_xlim(0, width * max(across, 2))
    axes.set_ylim(-height * (rows - 1) - 1.1, 0.35)
    axes.set_aspect("equal", anchor="NW")
    figure.savefig(path)


def plot_misclassified(path: Path, images: np.ndarray, evaluation: Evaluation, title: str) -> None:
    """Up to forty mistakes, the most confident first."""
    wrong = np.flatnonzero(~evaluation.correct)
    worst = wrong[np.argsort(-evaluation.confidences[wrong])][:40]
    rows = max(math.ceil(len(worst) / 8), 1)
    shown = f"all {len(wrong)}" if len(wrong) <= 40 else f"the worst 40 of {len(wrong)}"
    figure = new_figure(
        11,
        1.75 * rows + 1.0,
        title,
        f"Mistakes on the test images, the most confident first: {shown} (label > prediction, confidence).",
    )
    panels = place_panels(figure, rows, 8, wspace=0.06, hspace=0.22)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, index in zip(panels.flat, worst, strict=False):
        said = (
            f"{evaluation.labels[index]} > {evaluation.predictions[index]}, {100 * evaluation.confidences[index]:.0f}%"
        )
        show_image(axes, images[index], said)
    if not len(worst):
        figure.text(0.5, 0.4, "none: every test image is right", ha="center", fontsize=14)
    figure.savefig(path)


def plot_calibration(path: Path, evaluation: Evaluation, title: str) -> None:
    """Confidence against how often it is right, and how many images have which confidence."""
    counts, confidence, accuracy = calibration_bins(evaluation)
    filled = counts > 0
    figure = new_figure(
        11.5,
        5.4,
        title,
        "An honest network is right in 80% of the cases in which it is 80% sure: its points lie on the diagonal.",
    )
    reliability, histogram = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 1], "--", color=MUTED, label="honest")
    spread = 1.96 * np.sqrt(np.maximum(accuracy * (1 - accuracy), 0.25 / (counts + 1)) / np.maximum(counts, 1))
    low, high = np.clip(accuracy - spread, 0, 1), np.clip(accuracy + spread, 0, 1)
    bars = np.stack([accuracy - low, high - accuracy])[:, filled]
    reliability.errorbar(
        confidence[filled],
        accuracy[filled],
        bars,
        fmt="o",
        color=BLUE,
        capsize=3,
        label="the network, with 95% intervals",
    )
    reliability.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.05))
    reliability.legend(frameon=False, loc="upper left")
    reliability.set_title(f"expected calibration error {expected_calibration_error(evaluation):.4f}")
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    for kind, colour, chosen in (("right", BLUE, evaluation.correct), ("wrong", RED, ~evaluation.correct)):
        histogram.hist(evaluation.confidences[chosen], edges, color=colour, alpha=0.75, label=f"{kind}: {chosen.sum()}")
    histogram.set_yscale("symlog", linthresh=1)
    histogram.set(xlabel="confidence", ylabel="images (logarithmic)", xlim=(0, 1.02))
    histogram.legend(frameon=False, loc="upper left")
    histogram.set_title("how sure the network is")
    for axes in (reliability, histogram):
        axes.grid(alpha=0.25)
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs: everything is written beside its target and renamed into place
# ---------------------------------------------------------------------------------------------------------------------

STAGING, READY, CHECKPOINTS = ".staging", ".ready", ".checkpoint"  # hidden folders in the output folder
RESULTS = (
    "model.keras metrics.json history.csv predictions.csv samples.png pixels.png augmentation.png training_curves.png "
    "confusion_matrix.png predictions.png misclassified.png calibration.png external_predictions.csv "
    "external_predictions.png runs.csv"
).split()


EVALUATION_FILES = (
    "predictions.csv",
    "confusion_matrix.png",
    "predictions.png",
    "misclassified.png",
    "calibration.png",
)


class Stopped(BaseException):
    """SIGINT or SIGTERM came. No Exception, so that nothing on the way takes it for an error of its own."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `Stopped`, so that the run tidies up; a second one ends it at once."""
    signals = (signal.SIGINT, signal.SIGTERM)

    received: list[int] = []

    def stop(number: int, frame: Any) -> NoReturn:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        received.append(number)
        raise Stopped(number)

    signals = [each for each in signals if signal.getsignal(each) != signal.SIG_IGN]  # a shell's background job
    before = [signal.signal(each, stop) for each in signals]
    try:
        yield
    except Exception as error:
        if received:  # a C extension that was being loaded has made an ImportError of it
            raise Stopped(received[0]) from error
        raise
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the output folder and keep other runs out of it. The system lets go of the lock however the run ends.

    Raises:
        Failure: another run holds it, or it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise Failure(f"--output-dir {folder}: {describe(error)}; give a folder that can be written to") from error
    try:
        if not lock(descriptor):
            holder = os.read(descriptor, 200).decode(errors="replace") or "another run"
            raise Failure(f"--output-dir {folder}: is in use by {holder}; wait for it, or give another --output-dir")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {utc_now()}".encode())
        for name in RESULTS:
            if (folder / name).is_dir():
                raise Failure(f"--output-dir {folder}: {name} is a folder, where a file should go; move it away")
        finish_publishing(folder)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Take the lock on an open file, without waiting; whether it was free."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(
                descriptor, 1 << 30, os.SEEK_SET
            )  # Windows locks bytes against reading, so not those with the text
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return False
    return True


@contextlib.contextmanager
def results_folder(folder: Path) -> Iterator[Path]:
    """An empty hidden folder to write results to; they are moved into `folder` together, once all are written.

    Where the block raises, the earlier results stay as they were.

    Raises:
        Failure: the results cannot be written.
    """
    staging = folder / STAGING
    try:
        remove_folder(staging)
        if os.path.lexists(folder / READY):  # a link or a file: finish_publishing has left no folder
            (folder / READY).unlink()
        staging.mkdir()
        yield staging
        staging.rename(folder / READY)
    except OSError as error:
        raise Failure(
            f"--output-dir {folder}: the results could not be written ({describe(error)}); earlier ones are untouched"
        ) from error
    finally:  # also where a signal came after the renaming
        with contextlib.suppress(OSError):
            remove_folder(staging)
        finish_publishing(folder)


def finish_publishing(folder: Path) -> None:
    """Move complete results into place, also those of a run that was stopped between two moves."""
    ready = folder / READY
    if ready.is_symlink() or not ready.is_dir():
        return
    try:
        if (ready / "metrics.json").is_file():  # so that of the earlier run is still in its place
            remove_stale(folder, read_json(folder / "metrics.json"), read_json(ready / "metrics.json"))
        for file in sorted(ready.iterdir()):
            os.replace(file, folder / file.name)  # replaces a symbolic link, never follows it
        ready.rmdir()
    except OSError as error:
        raise Failure(
            f"--output-dir {folder}: complete results wait in {ready.name}, but could not be moved into place "
            f"({describe(error)}); the next run moves them"
        ) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, or a symbolic link, if there is one; what a link points to stays."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


def remove_stale(folder: Path, earlier: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Remove what the earlier run wrote and this one did not: no picture shall stand beside figures of another run."""
    for name in set(part(earlier, "files")) - set(metrics["files"]) & set(RESULTS):
        (folder / name).unlink(missing_ok=True)


def checkpoint_folder(config: Config, digits: Digits) -> Path:
    """The hidden folder for checkpoints: with those of the run to take up again under `--resume`, else empty.

    Raises:
        Failure: the run to take up again had other flags or other data, so the result would be neither's.
    """
    folder = config.output_dir / CHECKPOINTS
    identity = {name: getattr(config, name) for name in RESULT_FLAGS} | {"data": sha256_of_arrays(digits[:4])}
    unfinished = read_json(folder / "run.json")
    if config.resume and unfinished and not folder.is_symlink():
        changed = [name for name, value in identity.items() if unfinished.get(name) != value]
        if changed:
            flag = f"--{changed[0].replace('_', '-')}"
            why = "the learning rate follows a cycle over all epochs; " if changed[0] == "epochs" else ""
            raise Failure(
                f"--resume: {flag} is not as in the run that was stopped ({why}it would end with another result); "
                f"give {flag} as before, or leave --resume out to start anew"
            )
        return folder
    if config.resume:
        announce(config)("nothing to resume: starting anew")
    remove_folder(folder)
    folder.mkdir()
    write_json(folder / "run.json", identity)
    return folder


def append_run(folder: Path, metrics: dict[str, Any], exit_code: int) -> None:
    """Add one row to runs.csv. The row is one write at the file's end, which no other process can come between.

    Raises:
        Failure: it cannot be written, or is a symbolic link.
    """
    row = {
        "finished_at": metrics["finished_at"],
        "seed": metrics["config"]["seed"],
        "data": metrics["dataset"]["name"],
        "test_accuracy": f"{metrics['test_accuracy']:.4f}",
        "test_loss": f"{metrics['test_loss']:.5f}",
        "seconds": f"{metrics['timings_seconds']['total']:.1f}",
        "exit_code": exit_code,
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(folder / "runs.csv", flags, 0o644)
        try:
            while not lock(descriptor):
                time.sleep(0.01)
            if os.fstat(descriptor).st_size == 0:
                writer.writeheader()
            writer.writerow(row)
            os.write(descriptor, text.getvalue().encode(errors="backslashreplace"))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Failure(f"{folder / 'runs.csv'}: {describe(error)}; the results themselves are in place") from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    columns = evaluation.labels, evaluation.predictions, (f"{value:.6f}" for value in evaluation.confidences)
    write_csv(path, ["index", "label", "prediction", "confidence"], zip(itertools.count(), *columns))


def write_json(path: Path, content: dict[str, Any]) -> None:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    path.write_text(json.dumps(content, indent=1, default=plain) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def part(metrics: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; empty where another program wrote something else there."""
    value = metrics.get(key)
    return value if isinstance(value, dict) else {}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 (hexadecimal) of each file in `folder`, by name."""
    return {file.name: sha256_of_file(file) for file in sorted(folder.iterdir())}


def sha256_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics_of_model(model_file: Path) -> dict[str, Any]:
    """The metrics.json of the run that made this model; empty where none lies beside it."""
    metrics = read_json(model_file.parent / "metrics.json")
    if part(metrics, "files").get(model_file.name) != sha256_of_file(model_file):
        return {}
    return part(metrics, "training") or metrics  # an evaluation into the same folder keeps those of the training


def peak_rss_mib() -> int | None:
    """The most memory that this process has held, in MiB; None on systems that do not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def utc_now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class Clock(NamedTuple):
    """When the run started, and how many seconds each stage took."""

    started_at: str
    seconds: dict[str, float]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, Any]:
    matrix = confusion_matrix(evaluation)
    return {
        "test_accuracy": evaluation.correct.mean(),
        "test_loss": cross_entropy(evaluation),
        "test_errors": (~evaluation.correct).sum(),
        "expected_calibration_error": expected_calibration_error(evaluation),
        "confusion_matrix": matrix,
        "per_digit": per_digit(matrix),
    }


def dataset_metrics(digits: Digits) -> dict[str, Any]:
    return {
        "name": digits.name,
        "origin": digits.origin,
        "sha256": sha256_of_arrays(digits[:4]),
        "training_images": len(digits.train_images),
        "test_images": len(digits.test_images),
    }


def environment_metrics(config: Config, clock: Clock) -> dict[str, Any]:
    """Under which flags and versions, when, how long and in how much memory the run ran."""
    import keras
    import matplotlib
    import tensorflow as tf

    modules = {"tensorflow": tf, "keras": keras, "numpy": np, "matplotlib": matplotlib}
    return {
        "config": dataclasses.asdict(config),
        "versions": {
            "mnist_digit_recognizer": VERSION,
            "python": platform.python_version(),
            **{name: module.__version__ for name, module in modules.items()},
        },
        "timings_seconds": clock.seconds | {"total": time.perf_counter() - STARTED},
        "peak_rss_mib": peak_rss_mib(),
        "started_at": clock.started_at,
        "finished_at": utc_now(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Main: the stages, in sequence
# ---------------------------------------------------------------------------------------------------------------------


def name_dataset(name: str) -> str:
    """A data set's name for titles; nobody shall take synthetic figures for MNIST's."""
    return {"mnist": "MNIST", "synthetic": "SYNTHETIC digits (not MNIST)"}.get(name, name)


def result_title(digits: Digits, evaluation: Evaluation) -> str:
    wrong, total = (~evaluation.correct).sum(), len(evaluation.labels)
    right = f"{100 * evaluation.correct.mean():.2f}% right"
    return f"{name_dataset(digits.name)}: {right}, {wrong:,} errors in {total:,} test images"


def refuse_to_replace_other_data(config: Config, digits: Digits) -> None:
    """The fallback to synthetic digits must not cost the results of a run on real ones.

    Raises:
        Failure: `--data auto` fell back, and the output folder holds results from another data set.
    """
    earlier = part(read_json(config.output_dir / "metrics.json"), "dataset").get("name", digits.name)
    if config.data == "auto" and digits.name == "synthetic" and earlier != digits.name:
        raise Failure(
            f"{config.output_dir} holds results on {earlier}, and they are kept: this run has only synthetic digits. "
            "Give another --output-dir, or the data with --data"
        )


def write_data_plots(folder: Path, images: np.ndarray, labels: np.ndarray, config: Config, title: str) -> None:
    """The pictures that need no trained model."""
    import tensorflow as tf

    plot_samples(folder / "samples.png", images, labels, title)
    plot_pixels(folder / "pixels.png", images[0], labels[0])
    firsts = np.array([np.flatnonzero(labels == digit)[0] for digit in range(10) if digit in labels])
    augment = augmentation(config)
    repeated = tf.constant(normalise(np.repeat(images[firsts], 12, axis=0)))
    order = np.random.default_rng(0).permutation(len(repeated))  # `augment_fast` counts on a batch in random order
    augmented = np.empty(repeated.shape[:3])
    augmented[order] = 255 * augment(tf.gather(repeated, order), tf.constant([config.seed, 0]))[..., 0]
    variants = augmented.reshape(len(firsts), 12, 28, 28)
    plot_augmentation(folder / "augmentation.png", images[firsts], variants, config.augment)


def write_evaluation(folder: Path, images: np.ndarray, evaluation: Evaluation, config: Config, title: str) -> None:
    """predictions.csv and the pictures that show how good a model is."""
    write_predictions(folder / "predictions.csv", evaluation)
    if config.plots:
        plot_confusion_matrix(folder / "confusion_matrix.png", confusion_matrix(evaluation), title)
        plot_predictions(folder / "predictions.png", images, evaluation, title)
        plot_misclassified(folder / "misclassified.png", images, evaluation, title)
        plot_calibration(folder / "calibration.png", evaluation, title)


def run_training(config: Config) -> dict[str, Any]:
    """Train, calibrate, evaluate, and write everything: the main job. Returns the metrics."""
    log, clock = announce(config), Clock(utc_now(), {})
    with results_folder(config.output_dir) as results:
        with clock.stage("startup"):
            import_tensorflow()
        with clock.stage("data"):
            digits = load_digits(config.data)
            refuse_to_replace_other_data(config, digits)
            parts = split_validation(digits, config.validation_split, config.train_limit)
            checkpoints = checkpoint_folder(config, digits)
        log(
            f"{name_dataset(digits.name)} from {digits.origin}: {len(parts[0]):,} images to train on, "
            f"{len(parts[2]):,} for validation, {len(digits.test_images):,} for the test"
        )
        with clock.stage("training"):
            model, history = train_committee(digits.name, parts, config, checkpoints, log)
        speed = sum(row["images"] for row in history) / sum(row["seconds"] for row in history)
        metrics = write_results(
            results, model, digits, parts, config, clock, {"training_images_per_second": speed}, history
        )
    remove_folder(checkpoints)
    return metrics


def train_committee(
    dataset: str, parts: tuple[np.ndarray, ...], config: Config, checkpoints: Path, log: Callable[[str], None]
) -> tuple[keras.Model, list[dict[str, float]]]:
    """Train `--members` networks, each calibrated, and join them where they are several."""
    x_train, y_train, x_validation, y_validation = parts
    validation = x_validation, targets_of(y_validation, 0)
    models, history = [], []
    for seed in range(config.seed, config.seed + config.members):
        training = training_set(x_train, y_train, dataset, seed)
        with strategy_scope(config.strategy):
            model = build_model(config.model, config.dropout, seed)
            log(f"{config.model} with {model.count_params():,} parameters, seed {seed}")
            rows = train_model(model, training, validation, config, seed, checkpoints / f"seed{seed}.npz", log)
        history += [{"seed": seed, **row} for row in rows]
        if config.model == "cnn":
            model = look_five_times(model)
        if config.members > 1:
            calibrate(model, x_validation, y_validation)
        models.append(model)
    return (models[0] if config.members == 1 else join_models(models)), history


def strategy_scope(name: str) -> contextlib.AbstractContextManager:
    """In which a model is built and trained: on one device, or on several that share out each batch."""
    import tensorflow as tf

    devices = tf.config.list_logical_devices("GPU")
    if name == "none" or (name == "auto" and len(devices) < 2):
        return contextlib.nullcontext()
    devices = devices or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices]).scope()


def write_results(
    results: Path,
    model: keras.Model,
    digits: Digits,
    parts: tuple[np.ndarray, ...],
    config: Config,
    clock: Clock,
    about: dict[str, Any],
    history: list[dict[str, float]],
) -> dict[str, Any]:
    """Calibrate and evaluate a trained model, and write all there is to say of it. Returns the metrics."""
    x_train, y_train, x_validation, y_validation = parts
    with clock.stage("evaluation"):
        temperature, validation = calibrate(model, x_validation, y_validation)
        evaluation = Evaluation(digits.test_labels, predict_probabilities(model, digits.test_images))
    with clock.stage("plots"):
        write_evaluation(results, digits.test_images, evaluation, config, result_title(digits, evaluation))
        if config.plots and history:
            write_data_plots(results, x_train, y_train, config, name_dataset(digits.name))
            plot_training_curves(results / "training_curves.png", history, name_dataset(digits.name))
    save_model(model, results / "model.keras")
    if history:
        write_csv(results / "history.csv", list(history[0]), (row.values() for row in history))
    metrics = {
        **evaluation_metrics(evaluation),
        "validation_accuracy": validation.correct.mean(),
        "validation_loss": cross_entropy(validation),
        "temperature": temperature,
        "rejection_threshold": rejection_threshold(validation.probabilities),
        "parameters": model.count_params(),
        "dataset": dataset_metrics(digits),
        **about,
        **environment_metrics(config, clock),
        "files": checksums(results),
    }
    write_json(results / "metrics.json", metrics)
    return metrics


def run_combination(config: Config) -> dict[str, Any]:
    """Join the models of earlier runs into a committee. Returns its metrics."""
    clock = Clock(utc_now(), {})
    with results_folder(config.output_dir) as results:
        with clock.stage("startup"):
            import_tensorflow()
            members = [load_member(folder / "model.keras") for folder in config.combine]
        with clock.stage("data"):
            digits = load_digits(config.data)
            refuse_to_replace_other_data(config, digits)
            parts = split_validation(digits, config.validation_split, config.train_limit)
            for folder in config.combine:
                refuse_other_training_data(folder, digits)
        about = {"members": [str(folder) for folder in config.combine]}
        return write_results(results, join_models(members), digits, parts, config, clock, about, [])


def load_member(path: Path) -> keras.Model:
    """A model that ends as this program's do, in a softmax layer over ten logits.

    Raises:
        Failure: it ends in another way, or cannot be loaded.
    """
    import keras

    model = load_model(path)
    if not isinstance(model.layers[-1], keras.layers.Softmax) or model.layers[-1].input.shape != (None, 10):
        raise Failure(f"--combine {path.parent}: its model does not end in a softmax layer, so it was not made here")
    return model


def refuse_other_training_data(folder: Path, digits: Digits) -> None:
    """A committee is calibrated on images that none of its members was trained on.

    Raises:
        Failure: the member in this folder was trained on another data set.
    """
    trained_on = part(metrics_of_model(folder / "model.keras"), "dataset")
    if trained_on and trained_on.get("sha256") != sha256_of_arrays(digits[:4]):
        raise Failure(
            f"--combine {folder}: was trained on other data ({trained_on.get('name')}) than --data names "
            f"({digits.name}); name the data that all members were trained on"
        )


def run_evaluation(config: Config) -> dict[str, Any]:
    """Measure a saved model on test images. Returns the metrics."""
    clock = Clock(utc_now(), {})
    with results_folder(config.output_dir) as results:
        with clock.stage("startup"):
            import_tensorflow()
            model = load_model(config.model_file)
        with clock.stage("data"):
            digits = load_digits(config.data)
            refuse_to_replace_other_data(config, digits)
        with clock.stage("evaluation"):
            evaluation = Evaluation(digits.test_labels, predict_probabilities(model, digits.test_images))
        with clock.stage("plots"):
            write_evaluation(results, digits.test_images, evaluation, config, result_title(digits, evaluation))
        training = metrics_of_model(config.model_file)
        kept = ("validation_accuracy", "validation_loss", "temperature", "rejection_threshold")
        earlier = part(read_json(config.output_dir / "metrics.json"), "files")
        kept_files = {name: checksum for name, checksum in earlier.items() if name not in EVALUATION_FILES}
        metrics = {
            **evaluation_metrics(evaluation),
            **{key: training.get(key) for key in kept},
            "parameters": model.count_params(),
            "dataset": dataset_metrics(digits),
            "training": training,
            **environment_metrics(config, clock),
            "files": kept_files | checksums(results),
        }
        write_json(results / "metrics.json", metrics)
    return metrics


def run_prediction(config: Config) -> int:
    """Recognise pictures; print a line for each, and write what was found. Returns the exit code."""
    pictures = list_pictures(config.predict)
    with results_folder(config.output_dir) as results:
        import_tensorflow()
        model = load_model(config.model_file)
        threshold = threshold_of_model(config.model_file)
        predictions = predict_files(model, pictures, threshold)
        write_csv(
            results / "external_predictions.csv",
            ["path", "digit", "confidence", "score", "verdict", *(f"p{digit}" for digit in range(10))],
            (external_row(path, prediction) for path, prediction in zip(pictures, predictions, strict=True)),
        )
        if config.plots:
            write_external_plot(results / "external_predictions.png", pictures, predictions)
    return EXIT_FAILED if None in predictions else EXIT_DONE


def external_row(path: Path, prediction: Prediction | None) -> list[str]:
    """A row of external_predictions.csv."""
    if prediction is None:
        return [printable(path), "", "", "", "unreadable", *[""] * 10]
    numbers = [f"{probability:.6f}" for probability in prediction.probabilities]
    digit, confidence, score = str(prediction.digit), f"{prediction.confidence:.4f}", f"{prediction.score:.4f}"
    return [printable(path), digit, confidence, score, prediction.verdict, *numbers]


def printable(path: Path) -> str:
    """A path in which control characters and broken encodings are escaped, so that it cannot add columns or lines."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def write_external_plot(path: Path, pictures: Sequence[Path], predictions: Sequence[Prediction | None]) -> None:
    """Draw the first forty pictures that could be read."""
    shown = [pair for pair in zip(pictures, predictions, strict=True) if pair[1] is not None][:40]
    with hushed():
        greys = [read_picture(file) for file, _ in shown]
    digits = [picture_to_digit(grey) for grey in greys]
    thumbnails = [scaled(grey, 200) for grey in greys]
    plot_external_predictions(
        path, [printable(Path(file.name)) for file, _ in shown], thumbnails, digits, [each for _, each in shown]
    )


def threshold_of_model(model_file: Path) -> float:
    """The rejection threshold of the run that made a model."""
    threshold = metrics_of_model(model_file).get("rejection_threshold")
    if isinstance(threshold, float):
        return threshold
    warn(
        f"WARNING: {model_file} has no metrics.json of its own run beside it, so the threshold between digits and "
        f"other things is not known; a usual one is taken ({USUAL_THRESHOLD})"
    )
    return USUAL_THRESHOLD


def predict_files(model: keras.Model, paths: Sequence[Path], threshold: float) -> list[Prediction | None]:
    """Recognise pictures in batches, and print a line for each. None: unreadable; a line on standard error says why."""
    import keras

    predictions: list[Prediction | None] = []
    bar = keras.utils.Progbar(len(paths)) if sys.stderr.isatty() and not sys.stdout.isatty() else None
    with ThreadPoolExecutor(PICTURES_AT_ONCE) as pool:
        for start in range(0, len(paths), PICTURES_PER_BATCH):
            batch = paths[start : start + PICTURES_PER_BATCH]
            with hushed():  # libtiff prints complaints of its own
                digits = list(pool.map(read_digit, batch))
            found = iter(recognise(model, [digit for digit in digits if isinstance(digit, np.ndarray)], threshold))
            for path, digit in zip(batch, digits, strict=True):
                prediction = next(found) if isinstance(digit, np.ndarray) else None
                if prediction is None:
                    warn(f"error: {path}: {digit}")
                predictions.append(prediction)
                name, best, confidence, _, verdict, *_ = external_row(path, prediction)
                say(name, best, confidence, verdict)
            if bar:
                with contextlib.redirect_stdout(sys.stderr):
                    bar.update(len(predictions))
    return predictions


def report(config: Config, metrics: dict[str, Any]) -> int:
    """Print the summary; its last line, which --quiet leaves, says it all. Returns the exit code."""
    log, dataset = announce(config), metrics["dataset"]
    title, accuracy = name_dataset(dataset["name"]), metrics["test_accuracy"]
    images = f"{dataset['test_images']:,}"
    log("")
    log(f"data         {title}, from {dataset['origin']}")
    log(f"accuracy     {100 * accuracy:.2f}%: {metrics['test_errors']} errors in {images} test images")
    log(f"loss         {metrics['test_loss']:.4f}; calibration error {metrics['expected_calibration_error']:.4f}")
    log("seconds      " + ", ".join(f"{name} {took:.1f}" for name, took in metrics["timings_seconds"].items()))
    log(f"memory       {metrics['peak_rss_mib']} MiB at the most")
    log(f"results      {config.output_dir.resolve()}")
    below = config.min_accuracy is not None and accuracy < config.min_accuracy
    verdict = f": BELOW the --min-accuracy of {100 * config.min_accuracy:g}%" if below else ""
    say(f"{100 * accuracy:.2f}% of {images} {title} test images are right{verdict}")
    return EXIT_BELOW_MINIMUM if below else EXIT_DONE


def run(config: Config) -> int:
    """Do what the flags ask for, alone in the output folder. Returns the exit code."""
    with hold_folder(config.output_dir):
        if config.predict:
            return run_prediction(config)
        job = run_combination if config.combine else run_evaluation if config.evaluate else run_training
        metrics = job(config)
        exit_code = report(config, metrics)
        append_run(config.output_dir, metrics, exit_code)
        return exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """The program: returns its exit code."""
    open_standard_streams()
    config = parse_config(arguments)
    try:
        with stop_on_signals():
            return run(config)
    except Failure as failure:
        warn(f"error: {failure}")
        return EXIT_FAILED
    except OSError as error:  # of a disk that is full or gone, where no stage has more to say
        warn(f"error: --output-dir {config.output_dir}: {describe(error)}")
        return EXIT_FAILED
    except MemoryError:
        warn("error: there is not enough memory; give a smaller --batch-size or --train-limit")
        return EXIT_FAILED
    except Stopped as stopped:
        number = stopped.args[0]
        warn(f"stopped by {signal.Signals(number).name}; --resume goes on from the last finished epoch")
        return 128 + number


if __name__ == "__main__":
    code = main()
    if code > 128:
        os._exit(code)  # a signal does not leave the seconds that TensorFlow takes to tear its pipeline down
    sys.exit(code)
