"""Tests of mnist_digit_recognizer.py.

    pytest                                              # three to four minutes, no network, no MNIST
    MNIST_DATA=mnist.npz pytest -m "slow or not slow"   # all, on the real data set
    TESTS_SEED=2 pytest                                 # the same on other images

They run on the CPU; CUDA_VISIBLE_DEVICES=0 TF_FORCE_GPU_ALLOW_GROWTH=true runs them on a GPU.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import datetime
import errno
import functools
import gzip
import hashlib
import html.parser
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

import mnist_digit_recognizer as program

keras = program.keras  # imported when something in it is first asked for
SCRIPT = Path(program.__file__).resolve()
README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
MNIST = os.environ.get("MNIST_DATA", "")
SEED = int(os.environ.get("TESTS_SEED", "1"))
posix = pytest.mark.skipif(os.name == "nt", reason="signals, fork and locks of POSIX")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
needs_mnist = pytest.mark.skipif(not MNIST, reason="MNIST_DATA names no copy of MNIST")

TABLES = {"model.keras", "metrics.json", "report.html", "history.csv", "predictions.csv", "runs.csv"}
EVALUATION_PICTURES = {f"{name}.png" for name in "confusion_matrix predictions misclassified calibration".split()}
EVALUATION_PICTURES |= {"feature_maps.png"}
PICTURES = EVALUATION_PICTURES | {"samples.png", "pixels.png", "augmentation.png", "training_curves.png"}
EXTERNAL = {"external_predictions.csv", "external_predictions.png"}

Arrays = dict[str, np.ndarray]
Patch = pytest.MonkeyPatch


class Run(NamedTuple):
    """A finished run: its output folder, what it printed, and its metrics.json."""

    folder: Path
    stdout: str
    stderr: str
    metrics: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model.keras"


Train = Callable[..., Run]
Publish = Callable[..., tuple[int, str, str]]


def cli(*arguments: object, cwd: Path, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as its users do, in a process of its own; in a `shell` command "$@" stands for it."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        ["sh", "-c", shell, "sh", *command] if shell else command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=1800,
        check=False,
    )


def call(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = program.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return code, out, err


def refused(*arguments: object, code: int = 1) -> str:
    """The one line on standard error of a run that fails."""
    found, out, err = call("--quiet", *arguments)
    assert (found, out) == (code, "")
    return only_line(err)


def only_line(text: str) -> str:
    assert text.find("\n") == len(text) - 1, text
    assert "Traceback" not in text
    return text.strip()


def tree(folder: Path) -> dict[str, bytes]:
    """The content of each file in a folder and below, hidden ones too; but not who held the folder last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def published(folder: Path) -> dict[str, bytes]:
    """What a user sees of an output folder: its files, the hidden ones aside."""
    return {name: content for name, content in tree(folder).items() if not name.startswith(".")}


def names(folder: Path) -> set[str]:
    """What is in a folder, hidden or not, the lock aside."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json, which must be strict JSON: no NaN, no Infinity."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_table(path: Path) -> dict[str, np.ndarray]:
    """A CSV file of numbers, by column."""
    rows = read_rows(path)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def is_whole(folder: Path) -> bool:
    """Whether there is a model and all files that metrics.json lists, as it lists them."""
    found = {name: hashlib.sha256(content).hexdigest() for name, content in published(folder).items()}
    listed = read_metrics(folder)["files"]
    return "model.keras" in listed and listed.items() <= found.items()


def weights(folder: Path) -> list[np.ndarray]:
    return program.load_model(folder / "model.keras").get_weights()


def equal_arrays(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def identical(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit, and the same predictions."""
    same = (one / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()
    return same and equal_arrays(weights(one), weights(other))


def flags_of_help() -> set[str]:
    return set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", program.build_parser().format_help(), re.MULTILINE))


def raising(error: BaseException) -> Callable[..., None]:
    """A function that raises this, whatever it is called with."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.fixture(scope="session", autouse=True)
def _no_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No download can succeed, no cache of the user's is read or written, and small runs start sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            patch.delenv(name, raising=False)
        if os.name != "nt":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs are started without
        if "CUDA_VISIBLE_DEVICES" not in os.environ:
            patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        patch.setenv("COLUMNS", "200")
        # `fit` is traced faster for one step at a time; runs in processes of their own take several.
        patch.setattr(program, "IMAGES_PER_EXECUTION", 1)
        yield


@pytest.fixture(scope="session")
def arrays() -> Arrays:
    """1,200 training and 300 test images."""
    images, labels = program.synthetic_digits(1500, seed=SEED)
    parts = images[:1200], labels[:1200], images[1200:], labels[1200:]
    return dict(zip(program.NPZ_KEYS, parts, strict=True))


@pytest.fixture(scope="session")
def tiny(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture(scope="session")
def training(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A training run with all results, in a process of its own, which takes its time while other tests run.

    As cron and containers start it: no locale, no input, no home that can be written to, in another folder.
    """
    folder = tmp_path_factory.mktemp("trained") / "out"
    flags = ["--data", tiny, *"--epochs 3 --seed 7 --output-dir".split(), folder]
    kept = 'CUDA_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES" ONEDNN_MAX_CPU_ISA="${ONEDNN_MAX_CPU_ISA:-DEFAULT}"'
    bare = f'cd / && exec env -i PATH=/usr/bin:/bin HOME=/proc {kept} "$@" <&-'
    command = [*(["sh", "-c", bare, "sh"] if os.name != "nt" else []), sys.executable, SCRIPT, *flags]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield folder, process
        process.kill()


@pytest.fixture(scope="session")
def trained(training: tuple[Path, subprocess.Popen[str]]) -> Run:
    folder, process = training
    stdout, stderr = process.communicate(timeout=1800)
    assert process.returncode == 0, stderr
    return Run(folder, stdout, stderr, read_metrics(folder))


def train_small(data: Path, folder: Path, *flags: object, code: int = 0) -> Run:
    """Train the small network in this process, with the flags given."""
    result = call("--data", data, "--model", "mlp", "--output-dir", folder, *flags)
    assert result[0] == code, result
    return Run(folder, result[1], result[2], read_metrics(folder))


@pytest.fixture(scope="session")
def mlp(training: object, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with all results of the small network, which loads and predicts faster; others only read it."""
    return train_small(tiny, tmp_path_factory.mktemp("mlp"), "--epochs", 3)


@pytest.fixture
def earlier(mlp: Run, tmp_path: Path) -> Path:
    """An output folder that already holds results."""
    return Path(shutil.copytree(mlp.folder, tmp_path / "earlier"))


@pytest.fixture
def untouched(earlier: Path) -> Iterator[Path]:
    """An output folder of whose published results the test may change nothing."""
    before = published(earlier)
    yield earlier
    assert published(earlier) == before


@pytest.fixture
def train(tiny: Path, tmp_path: Path) -> Train:
    """Train the small network for an epoch and without plots, or with the flags given."""
    return functools.partial(train_small, tiny, tmp_path / "out", "--epochs", 1, "--no-plots")


# Data: what is read

IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def idx_bytes(array: np.ndarray) -> bytes:
    """A file of MNIST's own format."""
    magic = {3: 2051, 1: 2049}[array.ndim]
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def write_idx(folder: Path, arrays: Arrays, dot: str = "-", zipped: bool = False) -> Path:
    """The four files of MNIST's own format."""
    folder.mkdir(exist_ok=True)
    for name, array in zip(IDX_FILES, arrays.values(), strict=True):
        path = folder / f"{name.replace('-idx', dot + 'idx')}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(idx_bytes(array), 1) if zipped else idx_bytes(array))
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_folder(mlp: Run, arrays: Arrays, tmp_path: Path, dot: str, zipped: bool) -> None:
    """Digits and their checksum do not depend on the format."""
    digits = program.load_digits(str(write_idx(tmp_path / "digits", arrays, dot, zipped)))
    assert equal_arrays(list(digits[:4]), list(arrays.values()))
    assert (digits.name, digits.sha256) == ("digits", mlp.metrics["dataset"]["sha256"])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint64, ">i4"])
def test_npz(arrays: Arrays, tmp_path: Path, dtype: Any) -> None:
    """Labels may be whole numbers of any type; other arrays in the file do not matter, nor does its name."""
    labels = {key: arrays[key].astype(dtype) for key in ("y_train", "y_test")}
    np.savez(tmp_path / "some.digits.npz", **(arrays | labels), other=np.array([{}], object))
    digits = program.load_digits(str(tmp_path / "some.digits.npz"))
    assert equal_arrays(list(digits[:4]), list(arrays.values()))
    assert all(array.dtype == np.uint8 for array in digits[:4])
    assert digits.name == "some.digits"
    for name in ("mnist", "synthetic"):
        shutil.copy(tmp_path / "some.digits.npz", tmp_path / f"{name}.npz")
        assert program.load_digits(str(tmp_path / f"{name}.npz")).name != name


def test_auto_without_network_takes_synthetic_digits(train: Train, untouched: Path, monkeypatch: Patch) -> None:
    """One short warning, and normal lines with the name of the data; but never over results on other data."""
    monkeypatch.setattr(program, "DRAWN_TRAINING", 200)
    monkeypatch.setattr(program, "DRAWN_TEST", 60)
    run = train("--data", "auto")
    assert run.metrics["dataset"]["name"] == "synthetic"
    assert "SYNTHETIC" in only_line(run.stderr)
    assert "http" not in run.stdout + run.stderr
    assert "synthetic" in run.stdout.splitlines()[-1].lower()
    assert train("--data", "synthetic").stderr == ""  # its own earlier results may be replaced
    code, _, err = call("--data", "auto", "--model", "mlp", "--epochs", 1, "--output-dir", untouched)
    assert code == 1
    assert str(untouched) in err.splitlines()[-1]


@pytest.mark.parametrize("why", ["no network", "stalls", pytest.param("no home", marks=posix)])
def test_mnist_that_is_unavailable(why: str, arrays: Arrays, tmp_path: Path, monkeypatch: Patch) -> None:
    """One line, and no progress bar; another data set in the cache is not taken for MNIST."""
    (tmp_path / "datasets").mkdir()
    np.savez(tmp_path / "datasets" / "mnist.npz", **arrays)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    if why == "stalls":
        monkeypatch.setattr(program, "DOWNLOAD_PATIENCE_SECONDS", 1)
        monkeypatch.setattr("keras.datasets.mnist.load_data", lambda: time.sleep(5))
    if why == "no home":  # containers may run under a number that no user has
        monkeypatch.setattr("pwd.getpwuid", raising(KeyError()))
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.delenv("KERAS_HOME", raising=False)
    assert "MNIST" in refused("--data", "mnist", "--output-dir", tmp_path / "out")


@needs_mnist
def test_mnist_is_known_by_its_content(monkeypatch: Patch, tmp_path: Path) -> None:
    """A copy in the cache is taken without a download, however it was zipped; under any name it is still MNIST."""
    (tmp_path / "datasets").mkdir()
    with np.load(MNIST) as content:
        np.savez(tmp_path / "datasets" / "mnist.npz", **content)
    shutil.copy(tmp_path / "datasets" / "mnist.npz", tmp_path / "other.npz")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    for source in ("auto", "mnist", str(tmp_path / "other.npz")):
        digits = program.load_digits(source)
        assert digits.name == "mnist"
        assert [len(array) for array in digits[:4]] == [60_000, 60_000, 10_000, 10_000]


# What is refused: data, models and pictures


def damaged(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One of many ways in which bytes go wrong."""
    size = len(content)
    start, end = sorted(draw.randrange(size) for _ in range(2))
    end = min(end, start + 3000)
    flipped = bytearray(content)
    for _ in range(5):
        flipped[draw.randrange(size)] ^= 1 << draw.randrange(8)
    ways = {
        "cut": content[:start],
        "beginning lost": content[start:],
        "bits flipped": bytes(flipped),
        "part lost": content[:start] + content[end:],
        "part twice": content[:end] + content[start:],
        "part zero": content[:start] + bytes(end - start) + content[end:],
        "part noise": content[:start] + draw.randbytes(end - start) + content[end:],
        "head noise": draw.randbytes(40) + content[40:],
        "tail noise": content[:-60] + draw.randbytes(60),
        "all noise": draw.randbytes(end - start),
        "text": b"x_train, y_train\n1, 2\n",
        "nothing": b"",
    }
    return draw.choice(list(ways.items()))


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def png(width: int, height: int, colour: int = 0, content: bytes = bytes(1000)) -> bytes:
    """A PNG that declares so many pixels, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, 8, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(content, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def encoded(image: Image.Image, ending: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending), **options)
    return stream.getvalue()


def good_files(arrays: Arrays, model: Path) -> dict[str, bytes]:
    """A good file of each kind that the program reads, by its name."""
    files = {"model.keras": model.read_bytes()}
    for name, save in (("zipped.npz", np.savez_compressed), ("stored.npz", np.savez)):
        stream = io.BytesIO()
        save(stream, **arrays)
        files[name] = stream.getvalue()
    for name, array in zip(IDX_FILES, arrays.values(), strict=True):
        files[name] = idx_bytes(array)
        files[f"{name}.gz"] = gzip.compress(files[name], 1)
    picture = Image.fromarray(np.kron(255 - arrays["x_test"][0], np.ones((4, 4), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 3
    pictures = {ending: encoded(picture, ending, exif=exif) for ending in ("png", "jpg", "webp", "tif")}
    pictures |= {ending: encoded(picture, ending) for ending in ("bmp", "gif")}
    return files | {f"picture.{ending}": content for ending, content in pictures.items()}


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_damaged_files(count: int, mlp: Run, arrays: Arrays, tiny: Path, tmp_path: Path) -> None:
    """Damaged at random, a file is read all the same or refused in one line that names it; never anything else."""
    draw, few = random.Random(SEED), {key: array[:60] for key, array in arrays.items()}
    faults, cases = [], list(itertools.product(good_files(few, mlp.model).items(), range(count)))
    assert len(cases) >= 90
    for (name, content), number in cases:
        folder = tmp_path / f"{name}-{number}"
        path, flags = folder / name, {"--model-file": mlp.model, "--data": tiny, "--output-dir": tmp_path / "out"}
        folder.mkdir()
        what, bad = damaged(content, draw)
        if "ubyte" in name:
            write_idx(folder, few)
            (folder / name.removesuffix(".gz")).unlink()
        path.write_bytes(bad)
        job = ["--predict", path] if name.startswith("picture") else ["--evaluate"]
        if job == ["--evaluate"]:
            flags["--model-file" if name.endswith("keras") else "--data"] = folder if "ubyte" in name else path
        code, _, err = call(*job, *itertools.chain(*flags.items()), "--no-plots", "--quiet")
        lines = [line for line in err.splitlines() if not line.startswith("WARNING: ")]
        named = [line for line in lines if line.startswith("error: ") and str(folder) in line]
        if code not in (0, 1) or not len(lines) == len(named) == code:
            faults.append(f"{name} {number}, {what}: exit code {code}, {err[-300:]!r}")
        shutil.rmtree(folder)
    assert not faults, "\n" + "\n".join(faults)


WRONG_ARRAYS = {
    "flat images": ("x_train", lambda x: x.reshape(len(x), 784)),
    "wide images": ("x_test", lambda x: np.pad(x, ((0, 0), (2, 2), (2, 2)))),
    "float images": ("x_train", lambda x: x / 255),
    "signed images": ("x_test", lambda x: x.astype(np.int16)),
    "no images": ("x_train", lambda x: x[:0]),
    "one number": ("x_train", lambda x: x[0, 0, 0]),
    "float labels": ("y_train", lambda y: y.astype(float)),
    "true-or-false labels": ("y_test", lambda y: y > 4),
    "one-hot labels": ("y_train", lambda y: np.eye(10, dtype=int)[y]),
    "label 10": ("y_train", lambda y: np.r_[np.uint8(10), y[1:]]),
    "label 256": ("y_test", lambda y: np.r_[np.int64(256), y[1:]]),
    "label -1": ("y_test", lambda y: np.r_[np.int8(-1), y[1:]]),
    "too few labels": ("y_train", lambda y: y[:-1]),
    "too few images": ("x_test", lambda x: x[:-1]),
    "training images without a 3": ("y_train", lambda y: np.where(y == 3, 5, y)),
    "test images without a 0": ("y_test", lambda y: np.where(y == 0, 1, y)),
    "labels for images": ("x_test", lambda x: x[:, 0, 0]),
}
WRONG_MEMBERS = {
    "missing": None,
    "huge": npy_header((10**12, 28, 28)),
    "too huge to count": npy_header((10**30, 28, 28)),
    "negative": npy_header((-1, 28, 28)),
    "declared but missing": npy_header((1000, 28, 28)),
    "not .npy": b"no array at all",
}


@pytest.mark.parametrize("fault", [*WRONG_ARRAYS, *WRONG_MEMBERS])
def test_npz_of_something_else(fault: str, arrays: Arrays, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    if fault in WRONG_ARRAYS:
        key, change = WRONG_ARRAYS[fault]
        np.savez(path, **(arrays | {key: change(arrays[key])}))
    else:
        members = {f"{key}.npy": npy_header((0,)) for key in program.NPZ_KEYS[1:]}
        write_zip(path, members | ({"x_train.npy": WRONG_MEMBERS[fault]} if WRONG_MEMBERS[fault] else {}))
    assert "bad.npz" in refused("--data", path, "--output-dir", tmp_path / "out")


def test_nothing_is_unpickled(arrays: Arrays, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "bad.npz"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    np.savez(path, **(arrays | {"x_train": np.array([Payload()], object)}))
    assert "bad.npz" in refused("--data", path, "--output-dir", tmp_path / "out")
    assert not marker.exists()
    with np.load(path, allow_pickle=True) as content:
        content["x_train"]
    assert marker.exists()  # so it would have shown


WRONG_IDX = {
    "header cut": lambda good: good[:10],
    "cut": lambda good: good[:-1],
    "too long": lambda good: good + b"\0",
    "of floats": lambda good: struct.pack(">4I", 0x0D03, 300, 28, 28) + bytes(300 * 784 * 4),
    "other size": lambda good: struct.pack(">4I", 2051, 300, 27, 28) + bytes(300 * 27 * 28),
    "labels": lambda good: struct.pack(">2I", 2049, 300) + bytes(300),
    "huge": lambda good: struct.pack(">4I", 2051, 2**32 - 1, 28, 28) + bytes(300 * 784),
    "missing": None,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("fault", WRONG_IDX)
def test_idx_of_something_else(fault: str, zipped: bool, arrays: Arrays, tmp_path: Path) -> None:
    path = write_idx(tmp_path, arrays) / "t10k-images-idx3-ubyte"
    good = path.read_bytes()
    path.unlink()
    if WRONG_IDX[fault]:
        content = WRONG_IDX[fault](good)
        path = path.with_name(f"{path.name}{'.gz' if zipped else ''}")
        path.write_bytes(gzip.compress(content, 1) if zipped else content)
    assert path.name in refused("--data", tmp_path, "--output-dir", tmp_path / "out")


def write_csv(path: Path, pixels: np.ndarray, labels: np.ndarray | None = None, header: bool = True) -> Path:
    """A file as Kaggle has them: (label and) 784 pixels a row, with names above."""
    rows = pixels.reshape(-1, 784) if labels is None else np.column_stack([labels, pixels.reshape(-1, 784)])
    above = ["label"] * (labels is not None) + [f"pixel{index}" for index in range(784)]
    lines = [",".join(map(str, row)) + "\n" for row in [above] * header + rows.tolist()]
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as stream:
        stream.writelines(lines)
    return path


def equal_digits(digits: program.Digits, *expected: np.ndarray) -> bool:
    return equal_arrays(list(digits[:4]), list(expected))


@pytest.mark.parametrize(("ending", "header"), [("csv", True), ("csv", False), ("csv.gz", True)])
def test_csv_of_labels_and_pixels(ending: str, header: bool, arrays: Arrays, tmp_path: Path) -> None:
    """The last seventh of the rows is the test set, and metrics.json says so."""
    x, y = arrays["x_train"], arrays["y_train"]
    digits = program.load_digits(str(write_csv(tmp_path / f"train.{ending}", x, y, header)))
    assert equal_digits(digits, x[:-171], y[:-171], x[-171:], y[-171:])
    assert digits.name == "train"
    assert "last seventh" in digits.origin


def test_csv_with_numbers_as_header(arrays: Arrays, tmp_path: Path) -> None:
    """Such files come from a pandas table whose columns have no names. An empty line above it does no harm."""
    x, y = arrays["x_train"], arrays["y_train"]
    train, test = write_csv(tmp_path / "train.csv", x, y), write_csv(tmp_path / "test.csv", arrays["x_test"])
    for path in (train, test):
        path.write_text("\n" + path.read_text().replace("pixel", ""))
    assert equal_digits(program.load_digits(str(train)), x[:-171], y[:-171], x[-171:], y[-171:])
    assert equal_arrays([program.read_csv(test)], [arrays["x_test"].reshape(-1, 784)])


@pytest.mark.parametrize(("start", "ending"), [("", "csv"), ("mnist_", "csv.gz")])
def test_folder_of_csv_files(start: str, ending: str, arrays: Arrays, tmp_path: Path) -> None:
    x, y = arrays["x_train"], arrays["y_train"]
    write_csv(tmp_path / f"{start}train.csv", x, y)
    write_csv(tmp_path / f"{start}test.{ending}", arrays["x_test"])  # as Kaggle has it, without labels
    assert equal_digits(program.load_digits(str(tmp_path)), x[:-171], y[:-171], x[-171:], y[-171:])
    write_csv(tmp_path / f"{start}test.{ending}", arrays["x_test"], arrays["y_test"])
    assert equal_digits(program.load_digits(str(tmp_path)), *arrays.values())


def test_from_csv_files_to_a_submission(arrays: Arrays, tmp_path: Path) -> None:
    data, test = write_csv(tmp_path / "train.csv", arrays["x_train"], arrays["y_train"]), arrays["x_test"]
    out = tmp_path / "out"
    code, log, err = call("--data", data, *"--model mlp --epochs 1 --no-plots --output-dir".split(), out)
    assert (code, err) == (0, "")
    assert f"{data}, its last seventh" in log
    assert f"{data}, its last seventh" in read_metrics(out)["dataset"]["origin"]
    code, log, err = call("--predict", write_csv(tmp_path / "test.csv", test), "--output-dir", out, "--quiet")
    assert (code, err) == (0, "")
    assert "300" in only_line(log)
    assert str(out / "submission.csv") in log
    said = probabilities(out / "model.keras", test).argmax(axis=1)
    expected = [{"ImageId": str(row), "Label": str(digit)} for row, digit in enumerate(said, start=1)]
    assert read_rows(out / "submission.csv") == expected
    before = published(out)
    assert "labels" in refused("--predict", data, "--output-dir", out)
    assert "labels" in refused("--data", tmp_path / "test.csv", "--output-dir", out)
    assert published(out) == before


WRONG_ROWS: dict[str, Callable[[str], str]] = {
    "short": lambda row: row.rsplit(",", 2)[0],
    "long": lambda row: row + ",0",
    "text": lambda row: row.replace("0", "zero", 1),
    "256": lambda row: row.replace("0", "256", 1),
    "nan": lambda row: row.replace("0", "nan", 1),
    "10": lambda row: "10" + row[1:],
    "negative": lambda row: row.replace("0", "-1", 1),
    "fraction": lambda row: row.replace("0", "0.5", 1),
    "empty field": lambda row: row.replace("0", "", 1),
    "other separator": lambda row: row.replace(",", ";"),
    "binary": lambda row: "\0\xff" * 20_000,
}


@pytest.mark.parametrize("number", [1, 7])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("fault", WRONG_ROWS)
def test_csv_with_a_wrong_row(fault: str, header: bool, number: int, arrays: Arrays, tmp_path: Path) -> None:
    """No row is left out without a word: those of a submission are counted."""
    path = write_csv(tmp_path / "train.csv", arrays["x_train"][:30], arrays["y_train"][:30] * (fault != "10"), header)
    lines = path.read_text().splitlines()
    lines[number - 1 + header] = WRONG_ROWS[fault](lines[number - 1 + header])
    path.write_text("\n\n".join(lines))
    if number == 1 and not header and fault in ("binary", "other separator"):
        return  # that may be a header
    message = refused("--data", path, "--output-dir", tmp_path / "out")
    assert str(path) in message
    assert re.search(rf"\brow {number}\b", message)


@pytest.mark.parametrize("kind", ["empty", "header", "narrow", "huge", "many rows", "one label"])
def test_csv_of_something_else(kind: str, arrays: Arrays, tmp_path: Path, monkeypatch: Patch) -> None:
    path = write_csv(tmp_path / "train.csv", arrays["x_train"][:100], arrays["y_train"][:100] * (kind != "one label"))
    if kind == "huge":
        os.truncate(path, 10 << 30)
    elif kind == "many rows":
        monkeypatch.setattr(program, "MAX_ROWS", 99)
    elif kind != "one label":
        path.write_text({"empty": "", "header": path.read_text().split("\n")[0], "narrow": "1,2\n3,4\n"}[kind])
    line = refused("--data", path, "--output-dir", tmp_path / "out")
    assert str(path) in line
    assert ("has no rows" in line) == (kind == "header")


MISSING = """--data {}/nowhere.npz|--data {}/nowhere/digits|--data {}/empty|--data {}/pipe|--data {}/loop
    --data {}/zero.npz|--output-dir {}/file|--output-dir {}/file/below|--predict {}/empty
    --evaluate --model-file {}/no.keras|--predict {}/file --model-file {}/no.keras"""


@posix
@pytest.mark.parametrize("line", [*re.split(r"\s*[|\n]\s*", MISSING), f"--data {{}}/{'n' * 5000}"])
def test_missing_things(line: str, untouched: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("keep me")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    flags = line.format(*[tmp_path] * 2).split()
    assert flags[-1] in refused("--output-dir", untouched, "--data", tiny, *flags)
    assert (tmp_path / "file").read_text() == "keep me"


def strange_model(kind: str, path: Path) -> None:
    """A model that is refused: of another shape, without probabilities, or with code of its own."""
    layers, digits, flat = keras.layers, keras.Input((28, 28, 1)), keras.layers.Flatten()
    head = [flat, layers.Dense(10, activation="softmax")]
    stacks = {
        "other input": [keras.Input((32, 32, 1)), *head],
        "colour": [keras.Input((28, 28, 3)), *head],
        "other output": [digits, flat, layers.Dense(11, activation="softmax")],
        "logits": [digits, flat, layers.Dense(10)],
        "zeros": [digits, flat, layers.Dense(10), layers.Rescaling(0.0)],
        "code": [digits, *head, layers.Lambda(lambda x: x)],
        "code inside": [digits, keras.Sequential([layers.Lambda(lambda x: x)]), *head],
        "code as activation": [digits, flat, layers.Dense(10, activation=lambda x: x)],
    }
    keras.Sequential(stacks[kind]).save(path)


STRANGE_CONFIGS = {  # what is replaced in the description of a good network, and by what
    "no JSON": ('{"module"', '"module"'),
    "other layer": ('"Dense"', '"NoSuch"'),
    "other module": ('"keras.layers"', '"os"'),
    "foreign layer": ('"Dense"', '"TFSMLayer"'),
    "function of Keras": ('"class_name": "Dense"', '"class_name": "function"'),
    "other weights": ('"units": 10', '"units": 11'),
}
STRANGE_MODELS = "other input|colour|other output|logits|zeros|code|code inside|code as activation".split("|")


@pytest.mark.filterwarnings("ignore:.*lambda:UserWarning")
@pytest.mark.parametrize("kind", [*STRANGE_CONFIGS, *STRANGE_MODELS, "folder"])
def test_model_files_that_are_refused(kind: str, mlp: Run, untouched: Path, tiny: Path) -> None:
    path = untouched.with_name("strange.keras")
    if kind in STRANGE_CONFIGS:
        with zipfile.ZipFile(mlp.model) as source:
            members = {name: source.read(name) for name in source.namelist()}
        old, new = (text.encode() for text in STRANGE_CONFIGS[kind])
        assert old in members["config.json"]
        write_zip(path, members | {"config.json": members["config.json"].replace(old, new)})
    elif kind == "folder":
        path.mkdir()
    else:
        strange_model(kind, path)
    line = refused("--evaluate", "--model-file", path, "--data", tiny, "--output-dir", untouched)
    assert "strange.keras" in line or kind in ("logits", "zeros")


@pytest.mark.filterwarnings("ignore:.*lambda:UserWarning")
def test_other_models_of_keras_can_be_used(tiny: Path, arrays: Arrays, tmp_path: Path) -> None:
    """Of any size, regularised, compiled with a loss of one's own, nested."""
    layers, inputs, inner_inputs = keras.layers, keras.Input((28, 28, 1)), keras.Input((28, 28, 1))
    convolution = layers.Conv2D(8, 3, 2, activation="relu", kernel_regularizer="l2", kernel_constraint="non_neg")
    inner = keras.Sequential([inner_inputs, convolution, layers.MaxPooling2D(), layers.Dropout(0.5), layers.Flatten()])
    hidden = layers.Dense(100, activation="relu")(inner(inputs) + inner(layers.RandomFlip()(inputs)))
    model = keras.Model(inputs, layers.Softmax()(layers.Dense(10, name="logits")(hidden)))
    model.compile("adam", lambda y_true, y_pred: y_pred)
    model.save(tmp_path / "theirs.keras")
    picture = save_pictures(tmp_path / "pictures", arrays["x_test"][:1])
    flags = "--model-file", tmp_path / "theirs.keras", "--output-dir", tmp_path / "out"
    assert call("--evaluate", "--tflite", "--data", tiny, *flags)[0] == 0
    assert names(tmp_path / "out") & PICTURES == EVALUATION_PICTURES - {"feature_maps.png"}  # which is for our own
    metrics = read_metrics(tmp_path / "out")
    assert metrics["tflite"]["accuracy"] == pytest.approx(metrics["test_accuracy"], abs=0.05)
    code, out, err = call("--predict", picture, *flags, "--no-plots")
    assert (code, len(predictions_of(out))) == (0, 1)
    assert "threshold" in only_line(err)
    (tmp_path / "theirs.keras").rename(tmp_path / "model.keras")
    flags = "--data", tiny, "--no-plots", "--output-dir", tmp_path / "joined"
    assert call("--combine", tmp_path, tmp_path, *flags)[0] == 0


@pytest.mark.slow
def test_a_network_like_the_mlp_by_somebody_else_has_no_feature_maps(tiny: Path, tmp_path: Path) -> None:
    """Its weights have the same shapes, but its last dense layer has another name."""
    layers = keras.layers
    dense = [layers.Dense(10, activation=name) for name in ("relu", "relu", "relu", "softmax")]
    keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), *dense]).save(tmp_path / "theirs.keras")
    flags = "--model-file", tmp_path / "theirs.keras", "--data", tiny, "--output-dir", tmp_path / "out"
    assert call("--evaluate", *flags)[0] == 0
    assert names(tmp_path / "out") & PICTURES == EVALUATION_PICTURES - {"feature_maps.png"}


@pytest.mark.slow
def test_feature_maps_whatever_the_activation(trained: Run, tiny: Path, tmp_path: Path) -> None:
    """A block ends where the next begins."""
    layers = program.build_model("cnn", 0.0, 0).layers
    body = [keras.layers.ReLU() if isinstance(layer, keras.layers.Activation) else layer for layer in layers]
    keras.Sequential([keras.Input((28, 28, 1)), *body]).save(tmp_path / "relu.keras")
    flags = "--model-file", tmp_path / "relu.keras", "--data", tiny, "--output-dir", tmp_path / "out"
    assert call("--evaluate", *flags)[0] == 0
    own, other = (Image.open(folder / "feature_maps.png") for folder in (trained.folder, tmp_path / "out"))
    assert own.size == other.size  # a block of the network that is not found leaves the picture smaller


UNREADABLE = {
    "huge.png": png(100_000, 100_000),
    "large.png": png(10_000, 10_001),
    "huger.png": png(2**31 - 1, 2**31 - 1),
    "flat.png": png(0, 10),
    "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "page.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n",
    "huge.bmp": b"BM" + struct.pack("<IHHIIiiHH6I", 100, 0, 0, 54, 40, 90000, 90000, 1, 24, *[0] * 6),
    "huge.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0" + b"\xff" * 4 + b"\0;",
}


def test_odd_and_unreadable_pictures(mlp: Run, tmp_path: Path) -> None:
    """Each picture that cannot be read is a row of its own and a line on standard error; all others are read."""
    rng, odd = np.random.default_rng(SEED), {}
    for height, width in (1, 1), (1, 2), (1, 3000), (3000, 1), (2, 30000), (3, 3), (65535, 1):
        for brightest in (1, 256):
            odd[f"{height}x{width}-{brightest}.png"] = rng.integers(0, brightest, (height, width), np.uint8)
    floats = [np.nan], [0, np.inf], [1e38, -1e38], [-3e38, 0, 3e38], [0, 1e-40], [np.nan, 1, 255]
    for number, some in enumerate(floats):
        odd[f"float{number}.tif"] = rng.choice(np.array(some, np.float32), (40, 40))
    images = {name: Image.fromarray(levels) for name, levels in odd.items()}
    images |= {"clear.png": Image.new("RGBA", (50, 50)), "CMYK.tif": Image.new("CMYK", (50, 50))}
    for name, image in images.items():
        image.save(tmp_path / name)
    for name, content in UNREADABLE.items():
        (tmp_path / name).write_bytes(content)
    flags = "--model-file", mlp.model, "--output-dir", tmp_path / "out", "--predict"
    code, out, err = call(*flags, *(tmp_path / name for name in [*UNREADABLE, *images]))
    rows = predictions_of(out)
    assert (code, len(rows)) == (1, len(UNREADABLE) + len(images))
    assert [Path(row[0]).name for row in rows if row[3] == "unreadable"] == list(UNREADABLE)
    for name, line in zip(UNREADABLE, err.splitlines(), strict=True):
        assert name in line


@linux
@pytest.mark.slow
def test_files_of_the_largest_size(mlp: Run, tiny: Path, tmp_path: Path) -> None:
    """What is declared is not believed: archives that unpack to gigabytes do not take the memory."""
    for name, large in (("bomb.npz", "x_train.npy"), ("bomb.keras", "config.json")):
        write_zip(tmp_path / name, {f"{key}.npy": npy_header((0,)) for key in program.NPZ_KEYS[1:]})
        archive = zipfile.ZipFile(tmp_path / name, "a", zipfile.ZIP_DEFLATED, compresslevel=1)
        with archive, archive.open(large, "w", force_zip64=True) as member:
            for _ in range(128):
                member.write(bytes(1 << 24))
    (tmp_path / "large.png").write_bytes(png(8_900, 8_900, 6, bytes(8_900 * (1 + 8_900 * 4))))
    for code, flags in (
        (1, ["--evaluate", "--data", "bomb.npz", "--model-file", mlp.model]),
        (1, ["--evaluate", "--data", tiny, "--model-file", "bomb.keras"]),
        (0, ["--predict", "large.png", "--model-file", mlp.model]),
    ):
        done = cli(*flags, "--output-dir", "out", cwd=tmp_path, shell='ulimit -v 16000000; exec "$@"')
        assert (done.returncode, done.stderr.count("\n")) == (code, code), done.stderr


# Flags

WRONG_FLAGS = """
    --epochs 0|--epochs -1|--epochs 1.5|--epochs ten|--epochs 1e3|--epochs|--batch-size 0|--batch-size 1.0
    --learning-rate 0|--learning-rate -1|--learning-rate nan|--learning-rate inf|--learning-rate fast
    --validation-split 0|--validation-split 1|--validation-split nan|--validation-split -0.1
    --label-smoothing -0.1|--label-smoothing 1|--dropout 1|--dropout -0.1|--dropout nan|--patience -1|--patience x
    --seed -1|--seed 1.5|--seed 99999999999|--train-limit 0|--train-limit -5|--train-limit all
    --rotation -1|--rotation 181|--rotation nan|--shift -0.1|--shift 1|--zoom -0.1|--zoom 1|--shear -1|--shear inf
    --elastic -1|--elastic nan|--augment fastest|--augment|--model resnet|--model CNN|--members 0|--members x
    --strategy tpu|--min-accuracy 1.1|--min-accuracy -0.1|--min-accuracy nan|--flip yes|--epoch 3|--no-such-flag
    --data|--output-dir|--predict|--combine|--model-file model.keras|--evaluate --predict x.png
    --predict x.png --min-accuracy 0.5|--predict x.csv y.csv|--predict x.png y.csv|--predict x.png --tflite
    --resume --evaluate|--combine a|--combine a outputs"""


@pytest.mark.parametrize("line", [*re.split(r"\s*[|\n]\s*", WRONG_FLAGS.strip()), f"--seed 1{'0' * 400}"])
def test_wrong_flag(line: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ("yes" if line == "--flip yes" else line.split()[0]) in refused(*line.split(), code=2)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("line", "code"), [("--help", 0), ("--version", 0), ("--epochs 0", 2)])
def test_quick_answers(line: str, code: int, tmp_path: Path) -> None:
    """Nothing that is slow to import is imported."""
    done = cli(*line.split(), cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == code
    assert {"--help": "--data SOURCE", "--version": program.VERSION}.get(line, "") in done.stdout
    assert "| numpy" in done.stderr
    assert not re.search(r"\| +(tensorflow|keras|matplotlib|scipy|PIL)\b", done.stderr)


@pytest.mark.parametrize("flags", ["--elastic 1 --augment keras", "--zoom 0.2 --augment none", "--flip --model mlp"])
def test_ranges_that_change_nothing(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    program.parse_config(flags.split())
    assert flags.split()[0] in only_line(capsys.readouterr().err)
    program.parse_config([*flags.split(), "--augment", "fast"])
    assert capsys.readouterr().err == ""


def test_requirements_are_those_of_the_script() -> None:
    [listed] = re.findall(r"^# dependencies = (\[.*\])$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert json.loads(listed) == SCRIPT.with_name("requirements.txt").read_text(encoding="utf-8").split()


def test_readme_lists_the_flags() -> None:
    rows = re.findall(r"^\| `--.*$", README, re.MULTILINE)
    listed = {flag for row in rows for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", row)}
    assert listed | {"--help"} == flags_of_help()


def test_the_headline_is_that_of_the_readme() -> None:
    [accuracy] = re.findall(r"--seed S`, S from 0 to 4 \| (\S+%)", README)
    assert f"{accuracy} of MNIST's test images" in str(program.__doc__)


def test_the_promises_of_the_readme_have_tests() -> None:
    named = set(re.findall(r"`(test_\w+)`", README))
    assert set() < named <= set(globals())


# Preprocessing and augmentation

STILL = {"rotation": 0, "shift": 0, "zoom": 0, "shear": 0, "elastic": 0, "flip": False}
STRONG = {"rotation": 15, "shift": 0.1, "zoom": 0.2, "shear": 0.2, "elastic": 1, "flip": True}


def test_split_validation(arrays: Arrays, tiny: Path, tmp_path: Path) -> None:
    """The first images are trained on, the last held out, none is lost, and neither part is empty."""
    digits = program.Digits(*arrays.values(), "tiny", "here", "")
    for limit, split, sizes in ((None, 0.1, (1080, 120)), (100, 0.25, (75, 25)), (2, 0.5, (1, 1))):
        x_train, y_train, x_validation, y_validation = program.split_validation(digits, split, limit)
        assert (len(x_train), len(x_validation)) == sizes
        assert np.array_equal(np.concatenate([x_train, x_validation]), arrays["x_train"][:limit])
        assert np.array_equal(np.concatenate([y_train, y_validation]), arrays["y_train"][:limit])
    for limit, split in ((2, 0.1), (2, 0.9), (1200, 0.0001), (1200, 0.9999)):
        flags = "--data", tiny, "--validation-split", split, "--train-limit", limit, "--output-dir", tmp_path
        assert "--validation-split" in refused(*flags)


def augmented(images: np.ndarray, ranges: dict[str, Any], seed: tuple[int, int] = (1, 2)) -> np.ndarray:
    return program.augment_fast(types.SimpleNamespace(**ranges), images, np.array(seed, np.int32)).numpy()


def moved(images: np.ndarray, **ranges: Any) -> np.ndarray:
    return program.move(types.SimpleNamespace(**(STILL | ranges)), images, np.array((1, 2), np.int32)).numpy()


def centres(images: np.ndarray) -> np.ndarray:
    """The centre of mass of each image, (n, 2): row, column."""
    return np.array([ndimage.center_of_mass(image) for image in images.reshape(-1, 28, 28).astype(float)])


@pytest.fixture(scope="session")
def batch(arrays: Arrays) -> np.ndarray:
    return program.normalise(arrays["x_train"][:256])


def test_augmentation_is_a_function_of_its_seed(batch: np.ndarray) -> None:
    """It gives images of the same kind, each of a batch its own; also of batches that cannot be halved."""
    for count in (1, 3, 256):
        result = augmented(batch[:count], STRONG)
        assert (result.shape, result.dtype) == ((count, 28, 28, 1), np.float32)
        assert ((result >= 0) & (result <= 1)).all()
        assert (result != batch[:count]).any()
        assert np.array_equal(result, augmented(batch[:count], STRONG))
    for seed in ((1, 3), (2, 2)):
        assert (augmented(batch, STRONG, seed) != result).any((1, 2, 3)).mean() > 0.9
    assert len(np.unique(augmented(np.repeat(batch[:1], 50, axis=0), STRONG), axis=0)) == 50


def test_ranges_of_zero_move_nothing(batch: np.ndarray) -> None:
    """But light varies: some images are left as they are, and some are not."""
    assert np.allclose(moved(batch), batch, atol=1e-4)
    unchanged = np.isclose(batch, augmented(batch, STILL), atol=1e-4).all((1, 2, 3))
    assert 0.05 < unchanged.mean() < 0.9
    none = program.augmentation(program.parse_config(["--augment", "none"]))
    assert np.array_equal(none(batch, np.array([0, 0], np.int32)), batch)


def test_shift(batch: np.ndarray) -> None:
    """By up to the given share of the width; under the other ranges the middle stays in the middle."""
    small = np.pad(batch[:, 7:21, 7:21], ((0, 0), (7, 7), (7, 7), (0, 0)))
    distance = centres(moved(small, shift=0.1)) - centres(small)
    assert np.abs(distance).max() <= 2.85
    assert np.abs(distance).max(axis=0).min() > 2
    assert np.abs(distance.mean(axis=0)).max() < 0.6
    assert np.abs(centres(moved(batch, rotation=10, zoom=0.1, shear=0.1)) - centres(batch)).max() < 1


def test_zoom(batch: np.ndarray) -> None:
    """Ink grows and shrinks with the area, by the given share in each direction at the most."""
    growth = moved(batch, zoom=0.2).sum((1, 2, 3)) / batch.sum((1, 2, 3))
    assert 0.55 < growth.min() < 0.87
    assert 1.13 < growth.max() < 1.65


def test_rotation() -> None:
    """A bar turns to both sides, up to the given angle."""
    bars = np.zeros((200, 28, 28, 1), np.float32)
    bars[:, 4:24, 13:15] = 1
    rows, columns = np.indices((28, 28)) - 13.5
    turned = moved(bars, rotation=20)[..., 0]
    angles = np.degrees((turned * rows * columns).sum((1, 2)) / (turned * rows**2).sum((1, 2)))
    assert 15 < angles.max() < 21.5
    assert -21.5 < angles.min() < -15


def test_flip_mirrors_half(batch: np.ndarray) -> None:
    result = moved(batch, flip=True)
    same, mirrored = (np.abs(result - other).max((1, 2, 3)) < 1e-3 for other in (batch, batch[:, :, ::-1]))
    assert (same | mirrored).all()
    assert 0.3 < mirrored.mean() < 0.7


def test_elastic_bends(batch: np.ndarray) -> None:
    """The strokes go elsewhere, not far, and stay strokes."""
    bent = program.distort(batch, 1.0, np.array([1, 2], np.int32)).numpy()
    assert bent.shape == batch.shape
    assert (np.abs(bent - batch).max((1, 2, 3)) > 0.1).all()
    assert np.abs(centres(bent) - centres(batch)).mean() < 1
    assert 0.8 < bent.sum() / batch.sum() < 1.2


@pytest.mark.filterwarnings("ignore:.*affine_transform:DeprecationWarning")
def test_augmentation_by_keras(batch: np.ndarray, train: Train) -> None:
    augment = program.augmentation(program.parse_config(["--augment", "keras", "--flip"]))
    one, same, other = (np.asarray(augment(batch[:32], np.array((seed, 1), np.int32))) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert train("--augment", "keras", "--train-limit", 200).metrics["config"]["augment"] == "keras"


# Training and evaluation


def test_networks() -> None:
    """The cnn has the layers of one, the mlp three hidden layers of ten; first weights are those of the seed."""
    one, same, other = (program.build_model("cnn", 0.3, seed) for seed in (1, 1, 2))
    kinds = [type(layer).__name__ for layer in one.layers]
    assert {"Conv2D", "MaxPooling2D", "Activation", "Flatten", "Dense", "Dropout"} <= set(kinds)
    assert kinds[-1] == "Softmax"
    activations = [layer for layer in one.layers if isinstance(layer, keras.layers.Activation)]
    assert [layer.activation.__name__ for layer in activations] == ["relu", "silu", "silu", "silu"]
    assert (one.input_shape, one.output_shape) == ((None, 28, 28, 1), (None, 10))
    assert equal_arrays(one.get_weights(), same.get_weights())
    assert not equal_arrays(one.get_weights(), other.get_weights())
    mlp = program.build_model("mlp", 0, 0)
    dense = [layer for layer in mlp.layers if type(layer).__name__ == "Dense"]
    assert [layer.units for layer in dense] == [10, 10, 10, 10]
    assert [layer.activation.__name__ for layer in dense[:3]] == ["relu"] * 3


def test_same_seed_same_weights(trained: Run, tiny: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """A second run, in another process, is bit-equal; without plots it draws none; quiet, it prints one line."""
    # With one step in each call of `fit`, as in the other tests of this process, TensorFlow rounds SiLU otherwise.
    monkeypatch.setattr(program, "IMAGES_PER_EXECUTION", 2048)
    flags = "--epochs", 3, "--seed", 7, "--output-dir", tmp_path / "out", "--no-plots", "--quiet"
    code, out, err = call("--data", tiny, *flags)
    assert (code, err) == (0, "")
    assert only_line(out) == trained.stdout.splitlines()[-1]
    assert names(tmp_path / "out") == TABLES
    assert identical(tmp_path / "out", trained.folder)


def test_other_seed_other_weights(mlp: Run, pair: Path, train: Train) -> None:
    """Under --resume, where there is nothing to resume, a run is as without it."""
    run = train("--epochs", 3, "--resume")
    assert run.stderr == ""
    assert identical(run.folder, mlp.folder)
    assert not equal_arrays(weights(run.folder), weights(pair / "two"))


def test_mlp_learns(train: Train, trained: Run) -> None:
    run = train("--epochs", 15, "--learning-rate", 0.01, "--dropout", 0.01, "--elastic", 0.2)
    assert run.metrics["parameters"] == 784 * 10 + 10 + 3 * 110
    assert run.metrics["test_accuracy"] > 0.25
    assert run.metrics.keys() == trained.metrics.keys()


def test_images_of_zeros_and_ones(arrays: Arrays, tmp_path: Path) -> None:
    """Faint, but valid: no error comes of the non-digits that are made of them."""
    dark = {name: array > 100 if name.startswith("x") else array for name, array in arrays.items()}
    np.savez(tmp_path / "dark.npz", **{name: array.astype(np.uint8) for name, array in dark.items()})
    train_small(tmp_path / "dark.npz", tmp_path / "out", "--epochs", 1, "--no-plots")


@pytest.mark.slow
def test_few_images(tiny: Path, tmp_path: Path) -> None:
    """Not every digit is among them, and they do not fill a batch."""
    train_small(tiny, tmp_path, "--epochs", 1, "--train-limit", 2, "--validation-split", 0.5)
    assert names(tmp_path) == TABLES | PICTURES


def test_patience_keeps_the_best_weights(train: Train, arrays: Arrays) -> None:
    """At this learning rate the validation loss soon gets worse; the model saved is the one of the best epoch."""
    flags = "--epochs", 60, "--learning-rate", 0.3, "--label-smoothing", 0, "--batch-size", 32
    run = train(*flags, "--patience", 1)
    history = read_table(run.folder / "history.csv")
    assert len(history["epoch"]) < 60
    logits = np.log(np.maximum(probabilities(run.model, arrays["x_train"][-120:]), 1e-30))
    raw = np.exp(logits * run.metrics["temperature"])  # as before calibration
    evaluation = program.Evaluation(arrays["y_train"][-120:], raw / raw.sum(axis=1, keepdims=True))
    assert program.cross_entropy(evaluation) == pytest.approx(history["val_loss"].min(), rel=0.01)


def test_loss_that_is_nan(untouched: Path, tiny: Path) -> None:
    """Even if only after the last step, where validation is the first to notice."""
    flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--batch-size", 2000, "--learning-rate", 1e38
    assert "--learning-rate" in refused(*flags, "--output-dir", untouched)


def test_steps_of_the_optimizer() -> None:
    """A kernel's step is nearly orthogonal, however uneven its gradient; the last layer and vectors follow Adam."""
    shapes, rng = [(3, 3, 8, 16), (72, 16), (16, 10), (16,)], np.random.default_rng(0)
    gradients = [(rng.normal(size=shape) * np.linspace(0.1, 1, shape[-1])).astype("f") for shape in shapes]
    variables = [keras.Variable(np.zeros(shape, "f")) for shape in shapes]
    program.make_optimizer(0.01).apply(gradients, variables)
    steps = [-variable.numpy() / 0.01 for variable in variables]
    for gradient, step in zip(gradients[:2], steps[:2], strict=True):
        spread = [np.linalg.svd(array.reshape(72, 16), compute_uv=False) for array in (gradient, step)]
        assert spread[0].max() > 5 * spread[0].min()
        assert spread[1].max() < 2 * spread[1].min()
        assert (gradient * step).sum() > 0
        assert np.sqrt(np.square(step).mean()) == pytest.approx(0.2, rel=0.3)
    for gradient, step in zip(gradients[2:], steps[2:], strict=True):
        assert step == pytest.approx(np.sign(gradient), abs=1e-3)


def test_test_time_augmentation() -> None:
    """The normalised geometric mean of what the network says of the image moved up and left, and down and right."""
    network = program.build_model("cnn", 0, 0)
    image = np.random.default_rng(0).integers(256, size=(1, 28, 28)).astype(np.uint8)
    image[:, [0, -1]] = image[:, :, [0, -1]] = 0
    moved = np.concatenate([np.roll(image, (step, step), (1, 2)) for step in (-1, 1)])
    mean = np.exp(np.log(program.predict_probabilities(network, moved)).mean(axis=0))
    found = program.predict_probabilities(program.add_test_time_augmentation(network), image)
    assert found[0] == pytest.approx(mean / mean.sum(), rel=1e-4)


@pytest.mark.parametrize("images", [1, 100, 3000, 10_000, 12_800, 58_320, 59_999])
def test_an_epoch_leaves_out_less_than_a_batch(images: int) -> None:
    for given in (128, None):
        batch_size, steps_per_epoch, steps_per_execution = program.count_steps(images, given)
        assert 0 <= images - steps_per_epoch * batch_size < batch_size
        assert steps_per_epoch % steps_per_execution == 0


def evaluation_of(labels: list[int], said: list[int], confidences: list[float]) -> program.Evaluation:
    """An Evaluation in which digit `said` has that confidence, and the other nine share the rest."""
    shares = np.repeat((1 - np.array(confidences))[:, None] / 9, 10, axis=1)
    shares[np.arange(len(said)), said] = confidences
    return program.Evaluation(np.array(labels, np.uint8), shares)


def test_expected_calibration_error_and_cross_entropy() -> None:
    """Two images at 0.9, one of them right, and two at 0.6, both right: (0.4 + 0.4) / 2."""
    evaluation = evaluation_of([1, 2, 3, 4], [1, 7, 3, 4], [0.9, 0.9, 0.6, 0.6])
    assert program.expected_calibration_error(evaluation) == pytest.approx(0.4)
    assert program.expected_calibration_error(evaluation_of([1, 2], [1, 2], [1.0, 1.0])) == pytest.approx(0)
    assert program.expected_calibration_error(evaluation_of([1, 2], [2, 1], [1.0, 1.0])) == pytest.approx(1)
    assert program.cross_entropy(evaluation) == pytest.approx(-np.log([0.9, 0.1 / 9, 0.6, 0.6]).mean())
    assert math.isfinite(program.cross_entropy(evaluation_of([1], [2], [1.0])))


def test_confusion_matrix_and_per_digit() -> None:
    matrix = program.confusion_matrix(evaluation_of([1, 1, 1, 2, 7], [1, 1, 7, 2, 2], [0.9] * 5))
    expected = np.zeros((10, 10))
    expected[1, 1], expected[1, 7], expected[2, 2], expected[7, 2] = 2, 1, 1, 1
    assert np.array_equal(matrix, expected)
    figures = program.per_digit(matrix)
    assert [row["digit"] for row in figures] == list(range(10))
    for digit, *values in ((1, 1, 2 / 3, 0.8), (2, 0.5, 1, 2 / 3), (7, 0, 0, 0), (3, 0, 0, 0)):
        assert [figures[digit][name] for name in ("precision", "recall", "f1")] == pytest.approx(values)


def test_temperature_is_that_of_confidence() -> None:
    """Over-confident, under-confident, calibrated."""
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=5000)
    for confidence, accuracy, low, high in ((0.99, 0.8, 1.5, 20), (0.5, 0.95, 0.05, 0.7), (0.8, 0.8, 0.95, 1.05)):
        said = np.where(np.arange(5000) < 5000 * accuracy, labels, (labels + rng.integers(1, 10, 5000)) % 10)
        assert low < program.fit_temperature(evaluation_of(labels, said, [confidence] * 5000)) < high


def test_calibration_helps_and_changes_no_prediction(arrays: Arrays) -> None:
    model, images, labels = program.build_model("cnn", 0, seed=3), arrays["x_test"], arrays["y_test"]
    before = program.Evaluation(labels, program.predict_probabilities(model, images))
    program.calibrate(model, images, labels)
    after = program.Evaluation(labels, program.predict_probabilities(model, images))
    assert program.cross_entropy(after) <= program.cross_entropy(before) + 1e-4
    assert np.mean(after.predictions == before.predictions) > 0.99
    assert not np.allclose(after.probabilities, before.probabilities, atol=1e-3)


# Results


def test_all_results_are_there(trained: Run) -> None:
    """And nothing else, hidden or not; metrics.json lists them with their checksums."""
    assert names(trained.folder) == TABLES | PICTURES
    assert is_whole(trained.folder)
    assert set(trained.metrics["files"]) == (TABLES | PICTURES) - {"metrics.json", "runs.csv"}
    assert_pictures(trained.folder)


def test_metrics(trained: Run, tiny: Path) -> None:
    metrics = trained.metrics
    assert {"validation_loss", "per_digit"} <= metrics.keys()  # all others are read here and in other tests
    assert (metrics["dataset"]["name"], metrics["dataset"]["origin"]) == ("tiny", str(tiny))
    assert re.fullmatch("[0-9a-f]{64}", metrics["dataset"]["sha256"])
    assert {1200, 300} <= set(metrics["dataset"].values())
    assert {"tensorflow", "keras", "numpy", "python"} <= metrics["versions"].keys()
    flags = {flag[2:].removeprefix("no-").replace("-", "_") for flag in flags_of_help()} - {"help", "version"}
    assert flags <= metrics["config"].keys()
    assert metrics["config"]["seed"] == 7
    started, finished = (datetime.datetime.fromisoformat(metrics[f"{what}_at"]) for what in ("started", "finished"))
    assert started.utcoffset() == finished.utcoffset() == datetime.timedelta(0)
    assert started <= finished
    assert all(took >= 0 for took in metrics["timings_seconds"].values())
    assert metrics["training_images_per_second"] > 0
    assert metrics["peak_rss_mib"] > 100
    assert 0.05 < metrics["temperature"] < 20
    assert 0 <= metrics["validation_accuracy"] <= 1
    assert 0 < metrics["rejection_threshold"] < 100


def test_metrics_agree_with_the_tables(trained: Run, arrays: Arrays) -> None:
    table, history = (read_table(trained.folder / name) for name in ("predictions.csv", "history.csv"))
    assert list(table) == ["index", "label", "prediction", "confidence"]
    assert np.array_equal(table["index"], np.arange(300))
    assert np.array_equal(table["label"], arrays["y_test"])
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (table["label"].astype(int), table["prediction"].astype(int)), 1)
    assert np.array_equal(matrix, trained.metrics["confusion_matrix"])
    assert trained.metrics["test_accuracy"] == pytest.approx(matrix.trace() / 300)
    assert trained.metrics["test_accuracy"] > 0.9  # by default; in batches of 128 fewer than 0.8
    assert set("epoch loss accuracy val_loss val_accuracy learning_rate seconds".split()) <= history.keys()
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["loss"][-1] < history["loss"][0]
    # Not equal: `validation_accuracy` is that of the saved model, with test-time augmentation, on 120 images only.
    assert history["val_accuracy"][-1] == pytest.approx(trained.metrics["validation_accuracy"], abs=0.2)


def probabilities(model: Path, images: np.ndarray) -> np.ndarray:
    """What plain Keras makes of a saved model, in safe mode."""
    return keras.models.load_model(model).predict(images[..., None] / np.float32(255), verbose=0).astype(float)


def test_model_opens_in_plain_keras(trained: Run, arrays: Arrays) -> None:
    """And it says what the tables say."""
    evaluation = program.Evaluation(arrays["y_test"], probabilities(trained.model, arrays["x_test"]))
    table = read_table(trained.folder / "predictions.csv")
    assert np.allclose(evaluation.probabilities.sum(axis=1), 1, atol=1e-4)
    assert np.mean(evaluation.predictions == table["prediction"]) > 0.98
    assert np.allclose(evaluation.confidences, table["confidence"], atol=1e-3)
    assert trained.metrics["test_loss"] == pytest.approx(program.cross_entropy(evaluation), rel=0.01)
    ece = program.expected_calibration_error(evaluation)
    assert trained.metrics["expected_calibration_error"] == pytest.approx(ece, abs=0.02)


def assert_pictures(folder: Path) -> None:
    """Each opens, is wide enough to look at, is not blank, and ends before its right edge."""
    for path in folder.glob("*.png"):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert picture.shape[1] >= 600, path
        assert len(np.unique(picture)) > 50, path
        assert picture[:, -6:].min() > 240, path


@pytest.mark.parametrize("right", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_pictures_of_extremes(right: bool, arrays: Arrays, tmp_path: Path) -> None:
    """A network that is always right, or always wrong, and sure of it."""
    labels, images = arrays["y_test"], arrays["x_test"]
    evaluation = program.Evaluation(labels, np.eye(10)[labels if right else (labels + 1) % 10])
    digits = program.Digits(images, labels, images, labels, "extreme", "", "")
    program.write_evaluation(tmp_path, digits, evaluation, program.parse_config([]))
    assert names(tmp_path) == EVALUATION_PICTURES - {"feature_maps.png"} | {"predictions.csv"}
    assert_pictures(tmp_path)


class Page(html.parser.HTMLParser):
    """What a page of HTML holds; fails where an element is not closed in its place."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.tags, self.attributes = "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        self.open += [tag] if tag not in ("meta", "img") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]


def test_report(trained: Run, tmp_path: Path) -> None:
    """One file, with all pictures in it, that asks for nothing else."""
    page = Page(trained.folder / "report.html")
    assert (trained.folder / "report.html").stat().st_size < 2_000_000
    assert set(program.CAPTIONS.values()) < set(page.all("alt"))
    assert all(name in page.text for name in PICTURES)
    sources = page.all("src")
    assert len(sources) == len(PICTURES) + 1
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert picture.width >= 600
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert not re.search(r"https?:|url\(|@import", (trained.folder / "report.html").read_text(encoding="utf-8"))
    assert not page.all("href")
    accuracy = f"{100 * trained.metrics['test_accuracy']:.2f}%"
    for expected in (accuracy, trained.metrics["finished_at"], "output_dir", *trained.metrics["versions"].values()):
        assert expected in page.text
    for row in trained.metrics["per_digit"]:
        assert f"{row['recall']:.4g}" in page.text
    assert all(sentence in page.text for sentence in program.CAPTIONS.values())


def test_the_readme_has_the_sentence_of_each_picture() -> None:
    assert set(program.CAPTIONS) == PICTURES
    for name, sentence in program.CAPTIONS.items():
        assert f"| `{name}` | {sentence} |" in README


def test_report_of_a_run_below_its_minimum(tiny: Path, mlp: Run, tmp_path: Path) -> None:
    """It says so first. Text from outside stays text; a damaged runs.csv costs nothing; no plots, no pictures."""
    data, out = tmp_path / "<b>&amp;'\"$x$\\q$.npz", tmp_path / "out"
    shutil.copy(tiny, data)
    out.mkdir()
    good = '2026-01-02T03:04:05+00:00,3,"a,b",0.9123,0.30000,12.3,0'
    wrong = [
        "2026-01-02T03,x",
        "",
        ",,,",
        good.replace("01-02", "02-30"),
        good.replace("2026", "9999"),
        good + ",.5" * 999,
    ]
    (out / "runs.csv").write_text("\n".join([",".join(program.RUN_COLUMNS), good, *wrong, good[:-7]]))
    flags = "--evaluate", "--model-file", mlp.model, "--data", data, "--min-accuracy", 1, "--output-dir", out
    for plots, pictures in (["--no-plots"], 0), ([], len(EVALUATION_PICTURES) + 1):
        assert call(*flags, *plots)[0] == 3
        page = Page(out / "report.html")
        assert "BELOW" in page.text[: page.text.index("accuracy")]
        assert str(data) in page.text
        assert "b" not in page.tags
        assert page.text.count("0.9123") == 1
        assert page.tags.count("img") == pictures
    assert (out / "runs.csv").read_text().count("\n2026-") == 7


def test_tflite(trained: Run, tiny: Path, arrays: Arrays, tmp_path: Path) -> None:
    """The README's lines read one digit; all of them together are as right as the metrics say."""
    out = tmp_path / "outputs"
    flags = "--tflite", "--no-plots", "--evaluate", "--model-file", trained.model, "--data", tiny, "--output-dir", out
    code, log, err = call(*flags)
    assert (code, err) == (0, "")
    figures, content = read_metrics(out)["tflite"], (out / "model.tflite").read_bytes()
    assert figures["bytes"] == len(content) <= 300_000
    assert f"{figures['bytes']:,} bytes" in log
    assert "Captures" not in log  # of what the converter prints
    assert figures["accuracy"] == pytest.approx(trained.metrics["test_accuracy"], abs=0.02)
    assert figures["loss"] == pytest.approx(trained.metrics["test_loss"], abs=0.1)
    Image.fromarray(arrays["x_test"][0]).save(tmp_path / "digit.png")
    [lines] = re.findall(r"```python\n(.*?model\.tflite.*?)```", README, re.DOTALL)
    assert len(lines.split("\n")) <= 12  # ten, a blank one and the end
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=False)
    table = read_table(trained.folder / "predictions.csv")
    assert done.stdout.strip() == str(int(table["prediction"][0])), done.stderr


def test_log_of_a_run_in_a_bare_environment(trained: Run) -> None:
    """Not on a terminal: plain lines, one an epoch, and the last says it all."""
    assert not re.search(r"[\r\x1b\b]", trained.stdout)
    assert [len(re.findall(rf"\b{epoch}/3\b", trained.stdout)) for epoch in (1, 2, 3)] == [1, 1, 1]
    assert f"{100 * trained.metrics['test_accuracy']:.2f}%" in trained.stdout.splitlines()[-1]
    assert str(trained.folder) in trained.stdout
    assert trained.stderr == ""


def test_evaluate_reproduces_the_run(trained: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = call("--evaluate", "--model-file", trained.model, "--data", tiny, "--output-dir", out)
    assert (code, err) == (0, "")
    metrics = read_metrics(out)
    for key in ("temperature", "rejection_threshold", "parameters"):
        assert metrics[key] == trained.metrics[key]
    for key in ("test_accuracy", "test_loss"):
        assert metrics[key] == pytest.approx(trained.metrics[key], rel=0.02)
    one, other = (read_table(folder / "predictions.csv") for folder in (out, trained.folder))
    assert np.allclose(one["confidence"], other["confidence"], atol=1e-3)
    assert names(out) == EVALUATION_PICTURES | {"metrics.json", "predictions.csv", "report.html", "runs.csv"}


def test_evaluate_in_place(pair: Path, earlier: Path, mlp: Run, tiny: Path) -> None:
    """The rest of the run's results stays; each model goes on with the threshold of its own run."""
    other, own = (pair / "two" / "model.keras", read_metrics(pair / "two")), (earlier / "model.keras", mlp.metrics)
    assert other[1]["rejection_threshold"] != own[1]["rejection_threshold"]
    flags = "--evaluate", "--data", tiny, "--output-dir", earlier, "--quiet"
    for (model, metrics), pictures in ((other, PICTURES), (own, PICTURES - EVALUATION_PICTURES)):
        code, out, err = call(*flags, "--model-file", model, *["--no-plots"] * (pictures != PICTURES))
        assert (code, err) == (0, "")
        assert only_line(out)
        assert names(earlier) == TABLES | pictures
        assert is_whole(earlier)
        assert (earlier / "model.keras").read_bytes() == mlp.model.read_bytes()
        for key in ("validation_loss", "temperature", "rejection_threshold"):
            assert read_metrics(earlier)[key] == metrics[key]


@pytest.mark.parametrize("content", ["", "[]", "3", '{"dataset"'])
def test_a_damaged_metrics_file_costs_nothing(content: str, earlier: Path, tiny: Path) -> None:
    (earlier / "metrics.json").write_text(content)
    flags = "--data", tiny, "--output-dir", earlier, "--model-file", earlier / "model.keras", "--no-plots", "--quiet"
    code, out, err = call("--evaluate", *flags)
    assert (code, err) == (0, "")
    assert only_line(out)


def test_a_data_file_with_a_strange_name(earlier: Path, tiny: Path, tmp_path: Path) -> None:
    """The name stands in titles, and in the one line of a quiet run."""
    path = Path(shutil.copy(tiny, tmp_path / "a$c$.npz"))
    with contextlib.suppress(OSError, UnicodeError):  # some file systems have no such names
        path = path.rename(path.with_name("a\n$c$ \udcff.npz"))
    code, out, err = call("--evaluate", "--data", path, "--output-dir", earlier, "--quiet")
    assert (code, err) == (0, "")
    assert only_line(out)


def test_only_results_are_replaced(earlier: Path, tiny: Path, arrays: Arrays, tmp_path: Path) -> None:
    """What an earlier run wrote goes, so that none stands beside a model of another; what is the user's own stays."""
    (earlier / "notes.txt").write_text("keep me")
    path, before = save_pictures(tmp_path / "pictures", arrays["x_test"][:1]) / "00000.png", tree(earlier)
    with contextlib.suppress(OSError, UnicodeError):  # some file systems have no such names
        path = path.rename(path.with_name("a\tb\n$c$ \udcff.png"))
    flags = "--output-dir", earlier, "--predict", path
    code, out, err = call(*flags)
    assert (code, err, len(predictions_of(out))) == (0, "", 1)  # a strange name makes no columns
    assert names(earlier) == TABLES | PICTURES | {"notes.txt"} | EXTERNAL
    assert {name: content for name, content in tree(earlier).items() if name not in EXTERNAL} == before
    assert call(*flags, "--no-plots")[0] == 0
    assert names(earlier) == TABLES | PICTURES | {"notes.txt", "external_predictions.csv"}
    flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--no-plots", "--output-dir", earlier
    assert call(*flags)[0] == 0
    assert names(earlier) == TABLES | {"notes.txt"}
    assert len(read_rows(earlier / "runs.csv")) == 2


def test_synthetic_digits(arrays: Arrays) -> None:
    """Framed as MNIST is, all digits equally often, no image twice, and a function of the seed."""
    images, labels = np.concatenate([arrays["x_train"], arrays["x_test"]]), np.r_[arrays["y_train"], arrays["y_test"]]
    assert (images.shape, images.dtype, labels.dtype) == ((1500, 28, 28), np.uint8, np.uint8)
    assert np.array_equal(np.bincount(labels), [150] * 10)
    assert len(np.unique(images, axis=0)) == 1500
    assert (images.max((1, 2)) > 150).all()
    for axis in (1, 2):
        inked = (images > 100).any(axis)
        assert (28 - inked.argmax(1) - inked[:, ::-1].argmax(1)).max() <= 22
    distance = np.abs(centres(images) - 14)
    assert np.quantile(distance, 0.95) < 1
    assert distance.max() < 3
    for count in (1, 10, 203):
        one, same, other = (program.synthetic_digits(count, seed) for seed in (5, 5, 6))
        assert (one[0].shape, one[1].shape) == ((count, 28, 28), (count,))
        assert equal_arrays(list(one), list(same))
        assert not np.array_equal(one[0], other[0])


@pytest.fixture(scope="session")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What a user gets who gives no flag."""
    cwd = tmp_path_factory.mktemp("default")
    done = cli("--data", MNIST, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return Run(cwd / "outputs", done.stdout, done.stderr, read_metrics(cwd / "outputs"))


@needs_mnist
@pytest.mark.slow
def test_mlp_learns_mnist(train: Train) -> None:
    assert train("--data", MNIST, "--epochs", 3, "--batch-size", 200).metrics["test_accuracy"] > 0.8


@needs_mnist
@pytest.mark.slow
def test_default_run(default_run: Run) -> None:
    metrics = default_run.metrics
    assert metrics["dataset"]["name"] == "mnist"
    assert metrics["test_accuracy"] >= 0.995
    assert read_table(default_run.folder / "history.csv")["val_accuracy"][0] >= 0.98
    assert metrics["test_loss"] <= 0.02
    assert metrics["expected_calibration_error"] <= 0.005
    assert metrics["peak_rss_mib"] <= 2048
    assert default_run.stderr == ""
    assert names(default_run.folder) == TABLES | PICTURES
    assert_pictures(default_run.folder)
    code = "import keras, sys; sys.exit(keras.models.load_model('model.keras').output_shape != (None, 10))"
    subprocess.run([sys.executable, "-c", code], cwd=default_run.folder, check=True)  # without this program
    seconds = metrics["timings_seconds"]
    assert seconds["evaluation"] + seconds["plots"] < 0.25 * seconds["total"]
    assert (default_run.folder / "report.html").stat().st_size < 2_000_000


@needs_mnist
@pytest.mark.slow
def test_tflite_of_the_default_run(default_run: Run, tmp_path: Path) -> None:
    flags = f"--evaluate --tflite --no-plots --data {MNIST} --model-file {default_run.model} --output-dir {tmp_path}"
    assert call(*flags.split())[0] == 0
    metrics = read_metrics(tmp_path)
    assert metrics["tflite"]["bytes"] <= 300_000
    assert metrics["tflite"]["accuracy"] > metrics["test_accuracy"] - 0.001
    assert metrics["tflite"]["loss"] < 0.02


@needs_mnist
@pytest.mark.slow
@pytest.mark.parametrize("look", ["inverted", "grey ground", "shadow", "blurred", "noisy"])
def test_looks_that_mnist_does_not_have(look: str, default_run: Run) -> None:
    """Training shows digits in another light than MNIST does."""
    digits = program.load_digits(MNIST)
    ink, rng = digits.test_images[:1000] / 255, np.random.default_rng(0)
    slope = np.linspace(0, 0.6, 28)
    looks = {
        "inverted": 1 - ink,
        "grey ground": 0.5 + 0.5 * ink,
        "shadow": slope + (1 - slope) * ink,
        "blurred": ndimage.gaussian_filter(ink, (0, 1, 1)),
        "noisy": ink + rng.normal(0, 0.2, ink.shape),
    }
    images = np.round(255 * looks[look].clip(0, 1)).astype(np.uint8)
    predictions = probabilities(default_run.model, images).argmax(axis=1)
    assert (predictions == digits.test_labels[:1000]).mean() > 0.9


# Pictures

# strokes in a unit box, x to the right, y down
STROKES = {
    "0": [[(0.5, 0), (0.1, 0.3), (0.1, 0.7), (0.5, 1), (0.9, 0.7), (0.9, 0.3), (0.5, 0)]],
    "1": [[(0.5, 0), (0.5, 1)]],
    "4": [[(0.3, 0), (0.1, 0.55), (0.95, 0.55)], [(0.7, 0.1), (0.7, 1)]],
    "4 apart": [[(0.1, 0), (0.1, 0.5), (0.55, 0.5)], [(0.8, 0.1), (0.8, 1)]],
    "5 apart": [[(0.3, 0.12), (0.25, 0.45), (0.8, 0.5), (0.8, 0.9), (0.1, 1)], [(0.45, 0), (0.95, 0)]],
    "7": [[(0.1, 0.1), (0.9, 0.05), (0.4, 1)]],
    "i": [[(0.5, 0.35), (0.5, 1)], [(0.5, 0.0), (0.5, 0.06)]],
}


def drawing(
    name: str,
    shape: tuple[int, int] = (300, 400),
    size: float = 200,
    pen: float = 16,
    corner: tuple[int, int] | None = None,
    angle: float = 0,
) -> np.ndarray:
    """Draw strokes: float32 (height, width), 1 where there is ink; anti-aliased."""
    height, width = shape
    top, left = corner or ((height - size) // 2, (width - size) // 2)
    turn = np.deg2rad(angle)
    canvas = Image.new("L", (4 * width, 4 * height))
    pencil = ImageDraw.Draw(canvas)
    for stroke in STROKES[name]:
        x, y = (np.array(stroke) - 0.5).T
        x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
        points = [(4 * (left + size * (0.5 + a)), 4 * (top + size * (0.5 + b))) for a, b in zip(x, y, strict=True)]
        pencil.line(points, fill=255, width=round(4 * pen), joint="curve")
        for a, b in points:
            pencil.ellipse([a - 2 * pen, b - 2 * pen, a + 2 * pen, b + 2 * pen], fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32) / 255


def photograph(
    ink: np.ndarray,
    rng: np.random.Generator,
    paper: tuple[float, ...] = (0.9, 0.88, 0.8),
    pen: tuple[float, ...] = (0.1, 0.12, 0.4),
    depth: float = 0.4,
    noise: float = 0.01,
    shade: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Photograph ink on paper in uneven light, a slope and soft blobs between 1 - depth and 1: (height, width, 3).

    ink: float (height, width); shade: a factor on the light.
    """
    height, width = ink.shape
    blobs = Image.fromarray(rng.random((3, 3)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    slope = np.linspace(0, 1, width)[None] * rng.uniform(0.3, 1) + np.linspace(0, 1, height)[:, None]
    light = shade * (1 - depth * (0.6 * slope / slope.max() + 0.4 * np.clip(blobs, 0, 1)))
    colours = np.array(paper) * (1 - ink[..., None]) + np.array(pen) * ink[..., None]
    lit = ndimage.gaussian_filter(colours * light[..., None], (0.7, 0.7, 0))
    return (255 * np.clip(lit + rng.normal(0, noise, lit.shape), 0, 1)).astype(np.uint8)


def saved(folder: Path, levels: np.ndarray | Image.Image, ending: str = "jpg", **options: Any) -> np.ndarray:
    """Save uint8 levels, or a Pillow image, and read it back as the program would: float32 (height, width)."""
    path = folder / f"picture.{ending}"
    (levels if isinstance(levels, Image.Image) else Image.fromarray(levels)).save(path, **options)
    return program.read_picture(path)[0]


def picture_to_digit(grey: np.ndarray) -> np.ndarray:
    return program.frame_digit(program.segment_ink(grey))


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two digits, slightly blurred, where shifted by a pixel they fit best: at most 1."""
    one, other = (ndimage.gaussian_filter(digit.astype(float), 1) for digit in (one, other))
    if not (one.any() and other.any()):
        return 0.0
    shifts = itertools.product((-1, 0, 1), repeat=2)
    return max(np.corrcoef(np.roll(one, shift, (0, 1)).ravel(), other.ravel())[0, 1] for shift in shifts)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_formats_and_modes_read_alike(mode: str, tmp_path: Path) -> None:
    wanted = 1 - drawing("4")
    image = Image.fromarray((255 * wanted).astype(np.uint8)).convert("RGB").convert(mode)
    others = {"CMYK": "jpg tiff", "1": "png bmp gif tiff", "P": "png bmp gif tiff"}
    for ending in others.get(mode, "png jpg bmp gif webp tiff").split():
        levels = saved(tmp_path, image, ending)
        assert (levels.dtype, levels.shape) == (np.float32, wanted.shape)
        assert np.abs(levels - wanted).mean() < 0.02


def test_deep_levels_are_scaled_not_clipped(tmp_path: Path) -> None:
    """Of 16 bits, of floats and of long integers; and what is transparent is white."""
    wanted, ink = np.linspace(0, 1, 64 * 64).reshape(64, 64), (255 * drawing("4")).astype(np.uint8)
    kinds = [("png", np.uint16, 65535), ("tiff", np.uint16, 65535), ("tiff", np.int32, 255), ("tiff", np.int32, 65535)]
    for ending, dtype, scale in [*kinds, *itertools.product(["tiff"], [np.float32], [1, 255, 65535])]:
        assert np.allclose(saved(tmp_path, (scale * wanted).astype(dtype), ending), wanted, atol=1e-2)
    rgba = np.dstack([np.zeros_like(ink)] * 3 + [ink])
    assert np.abs(saved(tmp_path, rgba, "png") - (1 - ink / 255)).max() < 0.01
    palette = Image.fromarray(ink).point(lambda level: level > 127 and 255).convert("P")
    assert saved(tmp_path, palette, "gif", transparency=0)[0, 0] == 1


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path: Path, ending: str) -> None:
    image = Image.fromarray((255 * (1 - drawing("7"))).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 270 degrees
    lying = image.transpose(Image.Transpose.ROTATE_90)
    options = {"compression": "tiff_lzw"} if ending == "tiff" else {}  # Pillow 13 garbles raw TIFFs that lie on a side
    assert np.abs(saved(tmp_path, lying, ending, exif=exif, **options) - np.asarray(image) / 255).mean() < 0.02


def test_first_frame_and_long_side(tmp_path: Path) -> None:
    white, black = (Image.new("L", (2400, 30), level) for level in (255, 0))
    levels = saved(tmp_path, white, "gif", save_all=True, append_images=[black])
    assert levels.min() == 1
    assert max(levels.shape) <= program.MAX_SIDE


@pytest.mark.parametrize("name", list(STROKES))
@pytest.mark.parametrize("pen", [3, 12, 32])
def test_box_centre_stroke_and_parts(name: str, pen: float) -> None:
    """For dark ink on light paper, and for light on dark; no part of a digit is lost."""
    ink = drawing(name, (600, 800), 360, pen, corner=(20, 430))
    for levels in (1 - ink, ink):
        digit = picture_to_digit(levels)
        assert (digit.dtype, digit.shape) == (np.uint8, (28, 28))
        assert 18 <= max(np.ptp(np.nonzero(digit > 20), axis=1)) + 1 <= 21
        assert np.abs(np.array(ndimage.center_of_mass(digit)) - 14).max() < 0.6
        assert digit.max() > 200
        assert program.stroke_width(ndimage.zoom(digit / 255, 8, order=1)) / 8 > 1.7
        parts = [ndimage.label(part > 0.3, np.ones((3, 3)))[1] for part in (ink, program.segment_ink(levels))]
        assert parts[0] == parts[1]


def test_an_mnist_image_stays_as_it_is() -> None:
    ink = drawing("4", (28, 28), 17.5, 2.6, corner=(5, 5))
    once = picture_to_digit(ink) / np.float32(255)
    assert np.abs(once - picture_to_digit(1 - ink) / 255).max() < 0.05
    assert np.abs(once - picture_to_digit(once) / 255).mean() < 0.015


@pytest.mark.parametrize("side", [8, 12, 16, 28, 60])
def test_small_pictures_touching_their_border(side: int) -> None:
    ink, wanted = drawing("7", (side, side), side * 0.9, side / 8), picture_to_digit(1 - drawing("7", pen=22))
    for levels in (ink, 1 - ink):
        assert likeness(picture_to_digit(levels), wanted) > 0.85


@pytest.mark.parametrize("seed", range(4))
def test_specks_are_dropped(seed: int) -> None:
    rng, ink = np.random.default_rng(seed), drawing("7")
    specks = np.zeros_like(ink)
    specks[rng.integers(0, 300, 20), rng.integers(0, 400, 20)] = 1
    dusty = np.maximum(ink, ndimage.grey_dilation(specks, size=(2, 2)))
    assert likeness(picture_to_digit(1 - dusty), picture_to_digit(1 - ink)) > 0.98


PENS = {"blue": (0.1, 0.15, 0.5), "black": (0.05, 0.05, 0.05), "red": (0.6, 0.1, 0.1), "pencil": (0.55, 0.55, 0.55)}
PAPERS = {"white": (0.98, 0.98, 0.97), "cream": (0.95, 0.92, 0.8), "grey": (0.72, 0.72, 0.71)}


ROWS, COLUMNS = np.indices((300, 400))
SCENES: dict[str, dict[str, Any]] = {
    "chalk on a board": {"paper": (0.12, 0.25, 0.18), "pen": (0.9, 0.9, 0.88)},
    "hard shadow": {"shade": 1 - 0.35 / (1 + np.exp((260 - COLUMNS - 0.4 * ROWS) / 4))},
    "soft shadow": {"shade": 1 - 0.35 / (1 + np.exp((260 - COLUMNS - 0.4 * ROWS) / 15))},
    "a table on the left": {"shade": np.where(COLUMNS < 25, 0.15, 1)},
    "a table on the right": {"shade": np.where(COLUMNS > 375, 0.15, 1)},
    "a table at the top": {"shade": np.where(ROWS < 25, 0.15, 1)},
    "a table at the bottom": {"shade": np.where(ROWS > 275, 0.15, 1)},
    "ruled paper": {"lines": ROWS % 45 < 2},
    "tilted ruled paper": {"lines": (ROWS - 0.03 * COLUMNS) % 45 < 2},
    "squared paper": {"lines": (ROWS % 45 < 2) | (COLUMNS % 45 < 2)},
}
for pen, paper in itertools.product(PENS, PAPERS):
    SCENES[f"{pen} on {paper}"] = {"pen": PENS[pen], "paper": PAPERS[paper]}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(("name", "pen"), [("0", 16), ("4", 8), ("7", 30)])
def test_photographs(name: str, pen: float, scene: str, tmp_path: Path) -> None:
    """A photograph gives the same digit as a clean drawing does."""
    ink, how = drawing(name, size=170, pen=pen, angle=pen - 18), dict(SCENES[scene])
    drawn = np.maximum(ink, 0.45 * how.pop("lines", np.zeros(1)))
    digit = picture_to_digit(saved(tmp_path, photograph(drawn, np.random.default_rng(pen), **how), quality=70))
    assert likeness(digit, picture_to_digit(1 - ink)) > 0.9


def test_blank_pictures_have_no_ink(tmp_path: Path) -> None:
    """Nor has blank paper, photographed."""
    rng, shapes = np.random.default_rng(0), [(1, 1), (8, 8), (28, 28), (200, 200), (600, 800), (5, 900)]
    for shape, level in itertools.product(shapes, [0, 6, 90, 200, 255]):
        grey = saved(tmp_path, np.full((*shape, 3), (level, level // 2, level), np.uint8), quality=40)
        assert not picture_to_digit(grey).any(), (shape, level)
    for shape, noise in itertools.product(shapes[3:5], np.linspace(0, 0.05, 8)):
        grey = saved(tmp_path, photograph(np.zeros(shape), rng, noise=noise), quality=int(rng.integers(30, 95)))
        assert not picture_to_digit(grey).any(), (shape, noise)


def save_pictures(folder: Path, images: Any, inverted: bool = False) -> Path:
    """A PNG for each uint8 image, named by its number."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(255 - image if inverted else image).save(folder / f"{number:05d}.png")
    return folder


def predictions_of(out: str) -> list[list[str]]:
    """The lines of standard output: path, digit, confidence and verdict of each picture."""
    rows = [line.split("\t") for line in out.splitlines()]
    assert all(len(row) == 4 for row in rows)
    return rows


def test_predict_files_and_folders(trained: Run, arrays: Arrays, tmp_path: Path) -> None:
    """Rows come in the order of the arguments and of the names in a folder; what cannot be read stops nothing."""
    images, labels = arrays["x_test"][:60], arrays["y_test"][:60]
    folder = save_pictures(tmp_path / "d", images, inverted=True)
    blank, missing = tmp_path / "b.JPG", tmp_path / "m.png"
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_text("no picture")
    (folder / "._00000.png").write_text("what macOS adds to a zip")
    Image.new("RGB", (300, 200), "white").save(blank)
    flags = "--model-file", trained.model, "--output-dir", tmp_path / "out"
    code, stdout, err = call(*flags, "--predict", blank, folder, missing)
    rows = predictions_of(stdout)
    assert (code, names(tmp_path / "out")) == (1, EXTERNAL)
    digits = [str(folder / f"{number:05d}.png") for number in range(60)]
    assert [row[0] for row in rows] == [str(blank), *digits, str(folder / "broken.png"), str(missing)]
    assert rows[0][3] == "not-a-digit"
    assert [row[1:] for row in rows[61:]] == [["", "", "unreadable"]] * 2
    for name, line in zip(("broken.png", "m.png"), err.splitlines(), strict=True):
        assert name in line
    right = np.mean([int(row[1]) == label for row, label in zip(rows[1:61], labels, strict=True)])
    assert right > trained.metrics["test_accuracy"] - 0.2
    table = read_rows(tmp_path / "out" / "external_predictions.csv")
    assert list(table[0]) == ["path", "digit", "confidence", "score", "verdict", *(f"p{digit}" for digit in range(10))]
    assert [row["path"] for row in table] == [row[0] for row in rows]
    assert not any(row["digit"] + row["score"] + row["p0"] for row in table[61:])
    for row in table[1:61]:
        shares = np.array([float(row[f"p{digit}"]) for digit in range(10)])
        assert shares.sum() == pytest.approx(1, abs=1e-3)
        assert shares[int(row["digit"])] == shares.max() == pytest.approx(float(row["confidence"]), abs=1e-3)
        above = float(row["score"]) - trained.metrics["rejection_threshold"]
        assert (row["verdict"] == "digit") == (above > 0) or abs(above) < 1e-3
    assert_pictures(tmp_path / "out")


def test_a_picture_that_vanishes(mlp: Run, arrays: Arrays, tmp_path: Path, monkeypatch: Patch) -> None:
    """Each picture is opened once, so one that is gone right after costs no other its row."""
    folder, read = save_pictures(tmp_path / "pictures", arrays["x_test"][:3]), program.read_picture

    def read_once(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
        picture = read(path)
        path.unlink()
        return picture

    monkeypatch.setattr(program, "read_picture", read_once)
    code, out, err = call("--model-file", mlp.model, "--output-dir", tmp_path / "out", "--predict", folder)
    assert (code, err, len(predictions_of(out))) == (0, "", 3)
    assert names(tmp_path / "out") == EXTERNAL


@pytest.mark.slow
@needs_mnist
@pytest.mark.parametrize("inverted", [False, True])
def test_mnist_as_pictures(inverted: bool, default_run: Run, tmp_path: Path) -> None:
    """Read from PNGs, the test images give the accuracy that they have."""
    digits, direct = program.load_digits(MNIST), read_table(default_run.folder / "predictions.csv")
    folder = save_pictures(tmp_path / "mnist", digits.test_images[:3000], inverted)
    flags = "--model-file", default_run.model, "--output-dir", tmp_path / "out"
    rows = predictions_of(call(*flags, "--predict", folder)[1])
    right = np.mean([int(row[1]) == label for row, label in zip(rows, digits.test_labels, strict=False)])
    assert right == pytest.approx(np.mean(direct["label"][:3000] == direct["prediction"][:3000]), abs=0.003)


@pytest.mark.slow
@needs_mnist
def test_what_is_no_digit(default_run: Run, tmp_path: Path) -> None:
    """Photographs of drawn digits are accepted; blanks and textures are not; letters unlike digits score lower."""
    rng, pictures, rows, scores = np.random.default_rng(8), {"digits": [], "letters": [], "nothing": []}, {}, {}
    kinds = list(itertools.product(("0", "1", "4", "4 apart", "5 apart", "7"), (3, 8, 16, 26), PAPERS.values()))
    for name, pen, paper in kinds:
        ink = drawing(name, pen=pen, angle=rng.uniform(-15, 15))
        pictures["digits"].append(photograph(ink, rng, paper, PENS["blue" if pen > 8 else "black"]))
    for letter, size in itertools.product("ACDEFHJKLMNPQRTUVWXYacdefhjkmnprtuvwxy", (60, 90)):
        image = Image.new("L", (200, 200), 245)
        ImageDraw.Draw(image).text((60, 40), letter, fill=25, font=ImageFont.load_default(size))
        pictures["letters"].append(np.asarray(image))
    for side in (28, 64, 200, 400):
        noise, waves = rng.random((side, side)), np.sin(np.arange(side) * 44 / side) * np.ones((side, 1))
        blobs = ndimage.gaussian_filter(noise, side / 40)
        textures = np.zeros((side, side)), noise, noise > 0.5, waves / 2 + 0.5, blobs
        pictures["nothing"] += [(255 * texture).astype(np.uint8) for texture in textures]
    for name, images in pictures.items():
        flags = "--model-file", default_run.model, "--output-dir", tmp_path / "out", "--no-plots"
        rows[name] = predictions_of(call(*flags, "--predict", save_pictures(tmp_path / name, images))[1])
        table = read_rows(tmp_path / "out" / "external_predictions.csv")
        scores[name] = np.array([float(row["score"]) for row in table])
    assert np.mean([row[3] == "not-a-digit" for row in rows["nothing"]]) >= 0.95
    assert np.mean([row[1] == kind[0][0] for row, kind in zip(rows["digits"], kinds, strict=True)]) >= 0.9
    assert np.mean([row[3] == "digit" for row in rows["digits"]]) >= 0.9
    assert np.mean(scores["digits"][:, None] > scores["letters"]) >= 0.93  # the area under the ROC curve


# Numbers: what is read where a picture shows several digits

NUMBERS = {"numbers.csv", "numbers.png"}
WRITTEN = program.synthetic_digits(40, seed=10)


def write(*lines: str, height: int = 48, gap: float = 0.25, leading: float = 0.6) -> np.ndarray:
    """Ink, float (height, width), of drawn digits, always the same one of each; between numbers are blanks."""
    rows = []
    for line in lines:
        row = np.zeros((height, round(height * (0.5 + 1.3 * len(line)))), np.float32)
        left = height // 2
        for digit in line:
            if digit == " ":
                left += round(1.2 * height)
                continue
            image = WRITTEN[0][np.argmax(WRITTEN[1] == int(digit))]
            image = Image.fromarray(image[:, image.max(axis=0) > 40][image.max(axis=1) > 40])
            image = np.asarray(image.resize((round(height * image.width / image.height), height))) / np.float32(255)
            place = row[:, left : left + image.shape[1]]
            np.maximum(place, image, out=place)
            left += image.shape[1] + round(gap * height)
        rows.append(np.pad(row, ((round(leading * height), 0), (0, 0))))
    width = max(row.shape[1] for row in rows)
    return np.pad(np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows]), 30)


def boxes_around_lines(ink: np.ndarray) -> np.ndarray:
    """For two lines of `write`: boxes as wide as the picture, little higher than the digits."""
    inside = np.zeros((62, ink.shape[1] - 26))
    boxes = np.tile(np.pad(np.pad(inside, 3, constant_values=1), ((0, 9), (10, 10))), (2, 1))
    return np.pad(boxes, ((48, len(ink) - 48 - len(boxes)), (0, 0)))


def look_alike(model: object, images: np.ndarray) -> np.ndarray:
    """In place of a network: sure of what is like one of the drawn digits, undecided about anything else."""
    known = [WRITTEN[0][np.argmax(WRITTEN[1] == digit)] for digit in range(10)]
    shifted = [np.roll(known, shift, (1, 2)) for shift in itertools.product((-1, 0, 1), repeat=2)]
    vectors = []
    for each in (images, np.concatenate(shifted)):
        blurred = ndimage.gaussian_filter(each.astype(float), (0, 1, 1)).reshape(len(each), -1)
        centred = blurred - blurred.mean(axis=1, keepdims=True)
        vectors.append(centred / (np.linalg.norm(centred, axis=1, keepdims=True) + 1e-9))
    likenesses = (vectors[0] @ vectors[1].T).reshape(len(images), 9, 10).max(axis=1)
    sure = np.where(np.arange(10) == likenesses.argmax(axis=1)[:, None], 1 - 9e-5, 1e-5)
    return np.where(likenesses.max(axis=1, keepdims=True) > 0.85, sure, 0.1)


def numbers_of(out: str) -> list[tuple[int, str]]:
    """Line and number of each row of standard output."""
    rows = [line.split("\t") for line in out.splitlines()]
    assert all(len(row) == 4 for row in rows)
    return [(int(row[1] or 0), row[2]) for row in rows]


SHEETS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "black on white": lambda ink, rng: (255 * (1 - ink)).astype(np.uint8),
    "white on black": lambda ink, rng: (255 * ink).astype(np.uint8),
    "a photograph": photograph,
    "chalk": lambda ink, rng: photograph(ink, rng, (0.12, 0.25, 0.18), (0.9, 0.9, 0.88)),
    "falling lines": lambda ink, rng: photograph(ndimage.rotate(ink, -8, order=1), rng),
    "rising lines": lambda ink, rng: photograph(ndimage.rotate(ink, 8, order=1), rng),
    "a note on a table": lambda ink, rng: np.pad(
        photograph(ink, rng), ((50, 60), (70, 40), (0, 0)), constant_values=18
    ),
    "a box": lambda ink, rng: photograph(np.pad(np.pad(ink, 8, constant_values=1), 40), rng),
    "a box around each line": lambda ink, rng: photograph(np.maximum(ink, boxes_around_lines(ink)), rng),
    "squared paper": lambda ink, rng: photograph(
        np.maximum(np.pad(ink, 250), 0.35 * (np.indices(np.add(ink.shape, 500)) % 27 < 3).any(axis=0)), rng
    ),
    "a page of A4": lambda ink, rng: np.pad(
        (255 * (1 - ink)).astype(np.uint8), ((300, 3208 - len(ink)), (400, 2080 - ink.shape[1])), constant_values=255
    ),
    "specks": lambda ink, rng: photograph(np.maximum(ink, rng.random(ink.shape) > 0.9997), rng),
}


@pytest.fixture
def read(mlp: Run, tmp_path: Path, monkeypatch: Patch) -> Callable[..., tuple[int, str, str]]:
    """Run --read with a network that knows the digits of `write` for certain."""
    monkeypatch.setattr(program, "predict_probabilities", look_alike)
    return lambda *paths: call("--model-file", mlp.model, "--output-dir", tmp_path / "out", "--read", *paths)


@pytest.mark.parametrize("sheet", SHEETS)
def test_numbers_are_read_line_by_line(sheet: str, read: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """From top to bottom and from left to right; leading zeros stay, and wide gaps part numbers."""
    picture = SHEETS[sheet](write("0072 45", "380 1926"), np.random.default_rng(1))
    Image.fromarray(picture).save(tmp_path / "a.png")
    code, out, err = read(tmp_path / "a.png")
    assert (code, err, names(tmp_path / "out")) == (0, "", NUMBERS)
    assert numbers_of(out) == [(1, "0072"), (1, "45"), (2, "380"), (2, "1926")]


@pytest.mark.parametrize("turn", [0, -5])
def test_digits_may_touch_their_boxes(turn: int, read: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    ink = ndimage.zoom(write("3806", gap=0.4), 3, order=1)
    (top, *_, bottom), columns = (np.flatnonzero(ink.max(axis=axis) > 0.3) for axis in (1, 0))
    gaps = np.flatnonzero(np.diff(columns) > 1)
    boxes = np.zeros_like(ink)
    for side in (columns[0] - 5, *(columns[gaps] + columns[gaps + 1]) // 2, columns[-1] + 5):
        boxes[top : bottom + 1, side - 1 : side + 2] = 1
    boxes[[top - 1, top, bottom, bottom + 1], columns[0] - 6 : columns[-1] + 7] = 1
    sheet = np.maximum(ink, boxes)
    assert ndimage.label(sheet > 0.3)[1] == 1
    turned = np.pad(ndimage.rotate(sheet, turn, order=1), 40)
    Image.fromarray(photograph(turned, np.random.default_rng(1))).save(tmp_path / "a.png")
    assert numbers_of(read(tmp_path / "a.png")[1]) == [(1, "3806")]


def test_digits_that_touch_are_cut_apart(read: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    numbers = ["274", "3805", "60"]
    inks = [write(number, gap=-0.05) for number in numbers]
    marks = [ndimage.label(ink > 0.3)[1] for ink in inks]
    assert all(count < len(number) for count, number in zip(marks, numbers, strict=True))
    pictures = [(255 * (1 - ink)).astype(np.uint8) for ink in inks]
    assert numbers_of(read(save_pictures(tmp_path / "pictures", pictures))[1]) == [(1, number) for number in numbers]


@pytest.mark.parametrize("number", ["45", "77", "91", "97"])
def test_narrow_digits_that_touch_are_cut_apart(number: str) -> None:
    """Two digits that are together no wider than one is high are cut where they touch, and in few other places."""

    def squeeze(text: str) -> np.ndarray:
        return ndimage.zoom(write(text, gap=-0.05), (1, 0.55), order=1)

    ink, first = squeeze(number), np.flatnonzero(squeeze(number[0]).max(axis=0) > 0.3)[-1]
    assert ndimage.label(ink > 0.3)[1] == 1
    assert np.ptp(np.flatnonzero(ink.max(axis=0) > 0.3)) < 0.9 * 48
    (ways, place), *_ = program.find_lines((1 - ink).astype(np.float32))
    boxes = np.array([place(candidate.box) for _, candidates in ways for candidate in candidates])
    assert np.abs(boxes[:, 2] - first).min() < 4  # where the first one ends
    assert np.abs(boxes[:, 0] - first).min() < 4  # where the second one begins
    assert len(boxes) < 150


@pytest.mark.parametrize(("ending", "options"), [("jpg", {}), ("tif", {"compression": "tiff_lzw"})])
def test_the_place_and_confidence_of_numbers(
    ending: str, options: dict[str, str], read: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """In pixels of the picture as it is seen, also where it was shrunk, or lies on its side."""
    ink = np.kron(write("27", "950 3"), np.ones((4, 4)))
    upright = Image.fromarray((255 * (1 - ink)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = tmp_path / f"a.{ending}"
    upright.transpose(Image.Transpose.ROTATE_90).save(picture, exif=exif, **options)
    assert numbers_of(read(picture)[1]) == [(1, "27"), (2, "950"), (2, "3")]
    rows = read_rows(tmp_path / "out" / "numbers.csv")
    assert list(rows[0]) == "path line number confidence left top width height digits".split()
    kept = np.zeros_like(ink)
    for row in rows:
        left, top, width, height = (int(row[name]) for name in ("left", "top", "width", "height"))
        assert 150 < height < 240
        kept[top : top + height, left : left + width] = 1
        digits = [float(each) for each in row["digits"].split()]
        assert len(digits) == len(row["number"])
        assert float(row["confidence"]) == pytest.approx(np.prod(digits), abs=1e-3)
    assert (ink * kept).sum() > 0.97 * ink.sum()
    assert kept.mean() < 0.6
    assert_pictures(tmp_path / "out")


def doubt_fives(mlp: Run, score: float) -> Callable[[object, np.ndarray], np.ndarray]:
    """A network that knows the digits of `write`, but fives by so much more than the rejection threshold."""
    ratio = math.exp((mlp.metrics["rejection_threshold"] + score) / 0.9)
    doubtful = np.where(np.arange(10) == 5, ratio, 1) / (ratio + 9)

    def look(model: object, images: np.ndarray) -> np.ndarray:
        sure = look_alike(model, images)
        return np.where(sure[:, 5:6] > 0.5, doubtful, sure)

    return look


def test_a_doubtful_number_is_one_among_others(
    mlp: Run, read: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: Patch
) -> None:
    """Alone, two marks that barely pass for digits are taken for a word."""
    monkeypatch.setattr(program, "predict_probabilities", doubt_fives(mlp, 0.4))
    pictures = [(255 * (1 - ink)).astype(np.uint8) for ink in (write("55"), write("72 380", "1926 55"))]
    found = numbers_of(read(save_pictures(tmp_path / "pictures", pictures))[1])
    assert found == [(0, ""), (1, "72"), (1, "380"), (2, "1926"), (2, "55")]


def test_a_doubtful_number_has_digits_of_one_height(
    mlp: Run, read: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: Patch
) -> None:
    """Doubtful marks are a number where they are as high as each other, and a word where they are not."""
    monkeypatch.setattr(program, "predict_probabilities", doubt_fives(mlp, 1.5))
    even = write("55")
    inked = np.flatnonzero(even.max(axis=0) > 0.1)
    first, second = np.split(even, [inked[np.argmax(np.diff(inked) > 1) + 1]], axis=1)
    small = ndimage.zoom(second, 0.6, order=1)
    uneven = np.concatenate([first, np.pad(small, ((25, len(even) - 25 - len(small)), (0, 0)))], axis=1)
    pictures = [(255 * (1 - ink)).astype(np.uint8) for ink in (even, uneven)]
    assert numbers_of(read(save_pictures(tmp_path / "pictures", pictures))[1]) == [(1, "55"), (0, "")]


def test_a_number_full_of_ones_is_no_word() -> None:
    """Letters are full of strokes like ones, but these stand apart and are as sure as any digit."""
    number = [
        program.Digit(n, n + 1, None, (40 * n, 0, 40 * n + 20, 60), False, text, 1.0, 5.0)
        for n, text in enumerate("1101171")
    ]
    assert not program.is_word(number)
    assert program.is_word([digit._replace(cut=True) for digit in number])


def test_pictures_without_a_number(read: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """A path and three empty fields; files that cannot be read stop nothing."""
    rng, folder = np.random.default_rng(2), tmp_path / "pictures"
    words = Image.new("L", (500, 90), 255)
    ImageDraw.Draw(words).text((20, 20), "Hand und Kamm", fill=0, font=ImageFont.load_default(40))
    blank = photograph(np.zeros((200, 300)), rng)
    pictures = [blank, rng.integers(0, 256, (80, 90), np.uint8), np.zeros((28, 28), np.uint8), np.asarray(words)]
    save_pictures(folder, pictures)
    (folder / "broken.png").write_text("no picture")
    code, out, err = read(folder)
    assert code == 1
    assert "broken.png" in only_line(err)
    assert out.splitlines() == [f"{path}\t\t\t" for path in sorted(folder.iterdir())]
    assert len(read_rows(tmp_path / "out" / "numbers.csv")) == 5
    assert_pictures(tmp_path / "out")


def test_a_page_of_handwriting_is_not_cut_in_all_places(monkeypatch: Patch) -> None:
    """Joined letters all over a page would be hundreds of thousands of candidates, and minutes for nothing."""
    page = np.concatenate([np.concatenate([write("274", gap=-0.2)] * 2, axis=1)] * 2)
    candidates = []
    for most in (program.MAX_CUT_MARKS, 3):
        monkeypatch.setattr(program, "MAX_CUT_MARKS", most)
        candidates.append(sum(len(found) for ways, _ in program.find_lines(1 - page) for _, found in ways))
    assert candidates[1] < 0.1 * candidates[0]


def test_a_pale_mark_beside_dark_ones(read: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """A thin grey frame on a form, which is wide enough to be cut, and fades where it is scaled."""
    picture = Image.new("L", (500, 200), 255)
    pencil = ImageDraw.Draw(picture)
    for x in (50, 100, 150):
        pencil.line((x, 50, x, 150), fill=0, width=8)
    pencil.rectangle((240, 50, 400, 150), outline=122)
    pencil.line((240, 50, 400, 150), fill=122)
    picture.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[::2] == (0, "")


def test_numbers_in_pictures_of_extreme_sizes(read: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    pictures = []
    for height, width in ((1, 1), (2, 2), (1, 3000), (3000, 1), (5, 800), (64, 2000), (3, 40), (300, 300)):
        noise, block = (
            np.random.default_rng(4).integers(0, 256, (height, width), np.uint8),
            np.zeros((height, width), np.uint8),
        )
        block[height // 3 : height * 2 // 3 + 1, width // 3 : width * 2 // 3 + 1] = 255
        pictures += [noise, block, 255 - block]
    code, out, err = read(save_pictures(tmp_path / "pictures", pictures))
    assert (code, err, len({line.split("\t")[0] for line in out.splitlines()})) == (0, "", len(pictures))


def test_predict_says_that_read_reads_several_digits(mlp: Run, tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "pictures", [(255 * write(text)).astype(np.uint8) for text in ("5", "27", "80")])
    code, _, err = call("--model-file", mlp.model, "--output-dir", tmp_path / "out", "--predict", folder)
    assert code == 0
    assert "--read" in only_line(err)
    assert re.match("2 ", err)


@pytest.mark.slow
@needs_mnist
def test_numbers_of_test_images(default_run: Run, tmp_path: Path) -> None:
    """Rows of MNIST's test images are read as numbers; where they touch, more often than not digit by digit."""
    digits, rng, right = program.load_digits(MNIST), np.random.default_rng(3), {}
    for kind, overlap in (("apart", -3), ("touching", 1)):
        texts, pictures = [], []
        for chosen in rng.integers(0, 10_000, (40, 3)):
            row, left = np.zeros((36, 100), np.uint8), 8
            for image in digits.test_images[chosen]:
                image = image[:, image.max(axis=0) > 60]
                place = row[4:32, left : left + image.shape[1]]
                np.maximum(place, image, out=place)
                left += image.shape[1] - overlap
            texts.append("".join(map(str, digits.test_labels[chosen])))
            pictures.append(np.asarray(Image.fromarray(255 - row).resize((300, 108), Image.Resampling.BICUBIC)))
        flags = "--model-file", default_run.model, "--output-dir", tmp_path / kind, "--no-plots"
        out = call(*flags, "--read", save_pictures(tmp_path / f"{kind} pictures", pictures))[1]
        found = dict.fromkeys(sorted((tmp_path / f"{kind} pictures").iterdir()), "")
        for line in out.splitlines():
            found[Path(line.split("\t")[0])] += line.split("\t")[2]
        right[kind] = np.mean([text == number for text, number in zip(texts, found.values(), strict=True)])
    assert right["apart"] > 0.85
    assert right["touching"] > 0.8


@pytest.mark.slow
@needs_mnist
def test_words_are_no_numbers(default_run: Run, tmp_path: Path) -> None:
    """Letters and words, among them many strokes like ones, give no number of two digits or more."""
    rng, pictures = np.random.default_rng(4), []
    words = "hat and there year new how minimum hull mum Hand Kamm HELLO TOTAL EXIT u n m N M H W K R A e a".split()
    for word, size in itertools.product(words, (40, 60)):
        ink = Image.new("L", (size * (len(word) + 2), 3 * size))
        ImageDraw.Draw(ink).text((size, size), word, fill=255, font=ImageFont.load_default(size))
        leaning = ndimage.affine_transform(np.asarray(ink) / 255, [[1, 0], [0.2, 1]], offset=(0, -0.3 * size), order=1)
        pictures.append(photograph(leaning, rng))
    flags = "--model-file", default_run.model, "--output-dir", tmp_path / "out", "--no-plots"
    found = numbers_of(call(*flags, "--read", save_pictures(tmp_path / "pictures", pictures))[1])
    assert sum(len(number) > 1 for _, number in found) <= 0.05 * len(pictures)


# Unattended runs


class Killed(BaseException):
    """Stands for SIGKILL where a run in this process is to end at a certain point."""


@contextlib.contextmanager
def killed_at(epoch: int, seed: int = 0) -> Iterator[None]:
    """Runs in this process end right after the checkpoint of that epoch of the network with that seed."""
    save = program.save_checkpoint

    def save_and_die(path: Path, model: Any, history: list[Any], best: list[Any]) -> None:
        save(path, model, history, best)
        if path.stem == f"seed{seed}" and len(history) == epoch:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(program, "save_checkpoint", save_and_die)
        yield
        pytest.fail("the run went on")


@contextlib.contextmanager
def background(*arguments: object, cwd: Path, until: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The script in a process of its own, from when that file exists to the end of the block; errors.txt has errors."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    with open(cwd / "errors.txt", "wb") as errors:
        process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        deadline = time.monotonic() + 300
        while not until.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def publish(mlp: Run, monkeypatch: Patch) -> Publish:
    """Run the program where only the writing matters: in place of a job's results, small files of some content."""

    def run(folder: Path, content: str = "new", pictures: int = len(PICTURES)) -> tuple[int, str, str]:
        def job(config: program.Config) -> int:
            with program.stage_results(config.output_dir, program.RESULTS) as results:
                for name in [*sorted(TABLES - {"metrics.json", "runs.csv"}), *sorted(PICTURES)[:pictures]]:
                    (results / name).write_text(f"{content} {name}")
                program.write_json(results / "metrics.json", {"content": content})
            program.append_run(config.output_dir, program.row_of_run(mlp.metrics))
            return 0

        monkeypatch.setattr(program, "run_job", job)
        return call("--output-dir", folder)

    return run


def dies_at(step: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process that dies right before its file operation number `step`; whether it did die."""
    child = os.fork()
    if child == 0:
        steps = iter(range(step))

        def count(event: str, _: object) -> None:
            if event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"} and next(steps, None) is None:
                os._exit(9)

        sys.addaudithook(count)
        with contextlib.suppress(BaseException):
            action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_death_at_any_step_of_writing_leaves_old_or_new_results(tmp_path: Path, publish: Publish) -> None:
    """Old or new, and after the next start no file of the other, whatever that run does."""
    publish(tmp_path / "old", "old", 4)
    publish(tmp_path / "new", "new", 2)
    ends = {name: published(tmp_path / name) for name in ("old", "new")}
    row = {end.pop("runs.csv") for end in ends.values()}.pop()
    seen, died = [], True
    while died:
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / f"step{len(seen)}"))
        died = dies_at(len(seen), lambda folder=folder: publish(folder, "new", 2))
        assert call("--predict", tmp_path / "nowhere", "--output-dir", folder)[0] == 1  # the next start
        left = published(folder)
        assert left.pop("runs.csv").startswith(row)
        seen.append(next((name for name, end in ends.items() if left == end), f"mixed: {sorted(left)}"))
    assert len(seen) > 10
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)  # at first all old, then all new


@pytest.mark.slow
@posix
def test_sigkill_at_any_time_leaves_old_or_new_results(earlier: Path, tiny: Path, tmp_path: Path) -> None:
    before, draw = published(earlier), random.Random(0)
    for _ in range(6):
        flags = "--data", tiny, "--model", "mlp", "--epochs", 2, "--seed", 1, "--output-dir", earlier
        with background(*flags, cwd=tmp_path, until=earlier) as process, contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.2, 14))
        refused("--evaluate", "--data", tmp_path / "nowhere", "--output-dir", earlier)  # the next start
        assert is_whole(earlier)
        assert published(earlier) == before or read_metrics(earlier)["config"]["seed"] == 1


PLACES = [".lock", ".ready", ".staging", pytest.param(".checkpoint", marks=pytest.mark.slow)]  # which takes a training


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("place", PLACES)
def test_leftovers_do_not_cost_a_run(place: str, kind: str, tiny: Path, tmp_path: Path, publish: Publish) -> None:
    """Where the program keeps its own, other things are cleared away or refused, but not after hours of training."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "folder" / "model.keras").write_text("mine")
    out.mkdir()
    if kind == "file":
        (out / place).touch()
    elif kind == "folder":
        shutil.copytree(outside, out / place)
    else:
        (out / place).symlink_to(outside)
    flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--no-plots", "--output-dir", out
    code, stdout, err = call(*flags) if place == ".checkpoint" else publish(out)
    assert "model.keras" in names(out) or (code, "epoch" in stdout, str(out) in only_line(err)) == (1, False, True)
    assert tree(outside) == {"folder/model.keras": b"mine"}


@posix
def test_nothing_outside_is_changed_through_links(tiny: Path, tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    for number, name in enumerate(sorted(program.RESULTS)):
        (out / name).symlink_to(outside / name)
        if number % 2:  # every second one leads nowhere
            (outside / name).write_text("mine")
    before = tree(outside)
    flags = "--data", tiny, "--output-dir", out, "--model", "mlp", "--epochs", 2, "--no-plots"
    with killed_at(1):
        call(*flags)
    for name in ("seed0.part.npz", "seed0.damaged"):
        (out / ".checkpoint" / name).symlink_to(outside / name)
    assert call(*flags, "--resume")[0] == 0
    assert is_whole(out)
    assert not any((out / name).is_symlink() for name in TABLES | PICTURES)
    (out / "runs.csv").unlink()
    (out / "runs.csv").symlink_to(outside / "runs.csv")
    assert "runs.csv" in only_line(call(*flags[:4], "--evaluate")[2])
    assert tree(outside) == before


@posix
def test_a_second_run_is_refused_at_once(untouched: Path, tiny: Path) -> None:
    flags = "--data", tiny, "--output-dir", untouched
    with program.hold_folder(untouched):
        for more in ((), ("--resume",), ("--evaluate",), ("--predict", tiny)):
            assert str(os.getpid()) in refused(*flags, *more)
    (untouched / ".lock").write_text("process 1 on somewhere since 1970-01-01T00:00:00+00:00")  # killed, it left this
    assert "nowhere" in refused(*flags, "--evaluate", "--data", "nowhere")


@posix
@pytest.mark.parametrize(("number", "goes_on"), [("EAGAIN", False), ("EACCES", False), ("ENOLCK", True)])
def test_file_systems_without_locks(number: str, goes_on: bool, earlier: Path, tiny: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("fcntl.flock", raising(OSError(getattr(errno, number), "no lock for you")))
    code, _, err = call("--data", tiny, "--evaluate", "--output-dir", earlier, "--no-plots")
    assert code == (0 if goes_on else 1)
    assert str(earlier) in only_line(err)
    assert err.startswith("WARNING") == goes_on


LONG = "--model", "mlp", "--epochs", 40, "--batch-size", 32, "--dropout", 0.1
STAGES = {"start": ".staging", "training": ".checkpoint/seed0.npz", "end": ".staging/predictions.csv"}
SIGNALS = [("SIGINT", "start"), ("SIGTERM", "end"), ("SIGKILL", "training")]


@posix
@pytest.mark.parametrize(
    ("name", "stage"), [("SIGTERM", "training"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SIGNALS)]
)
def test_a_signal_ends_the_run_and_keeps_results(
    name: str, stage: str, earlier: Path, tiny: Path, tmp_path: Path
) -> None:
    """Long before it would have ended of its own accord; --resume ends with the weights of an unbroken run."""
    (earlier / ".lock").unlink()
    before, number = published(earlier), getattr(signal, name)
    more = ["--model", "cnn", "--epochs", 3] if name == "SIGKILL" else []
    flags = "--data", tiny, *LONG, *more, "--output-dir", earlier
    with background(*flags, cwd=tmp_path, until=earlier / STAGES[stage]) as process:
        if stage == "training":
            assert str(process.pid) in refused(*flags)
        process.send_signal(number)
        assert process.wait(120) == (-number if name == "SIGKILL" else 128 + number)
    assert published(earlier) == before
    if name != "SIGKILL":
        errors = only_line((tmp_path / "errors.txt").read_text())
        assert name in errors
        assert "--resume" in errors
        assert names(earlier) <= set(before) | {".checkpoint"}
    if name == "SIGKILL":  # in processes of their own, as the run that was killed; this one rounds otherwise
        done = cli(*flags, "--resume", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert 0 < done.stdout.count("\nepoch ") < 3
        assert cli(*flags[:-1], tmp_path / "whole", "--no-plots", cwd=tmp_path).returncode == 0
        assert identical(earlier, tmp_path / "whole")


@posix
def test_a_signal_among_the_imports_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(60)")
    done = cli("--data", "nowhere", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in done.stderr


def run_changed(change: str, *flags: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, after some lines of Python that replace parts of it."""
    start, end = "import signal, sys, mnist_digit_recognizer as program", "sys.exit(program.main(sys.argv[1:]))"
    command = [sys.executable, "-c", "\n".join([start, change, "program.prepare_streams()", end]), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@posix
@pytest.mark.parametrize("job", ["--seed 1", "--evaluate", "--predict ."])
def test_a_signal_at_a_bad_moment_is_still_a_signal(job: str, untouched: Path, tiny: Path) -> None:
    """Python drops what is raised while it frees an object, libraries make another error of it; not of a signal."""
    change = """
class Freed:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
def stop(*_):
    try:
        Freed()
    finally:
        raise ImportError("initialization failed")
program.load_digits = program.load_model = stop
"""
    pictures = save_pictures(untouched.with_name("pictures"), np.zeros((1, 28, 28), np.uint8))
    done = run_changed(change, *job.split(), "--data", tiny, "--output-dir", untouched, cwd=pictures)
    assert done.returncode == 143
    assert "SIGTERM" in only_line(done.stderr)
    assert ("--resume" in only_line(done.stderr)) == (job == "--seed 1")


@posix
@pytest.mark.slow
def test_a_signal_is_heard_within_a_long_step(tmp_path: Path) -> None:
    """Large batches keep TensorFlow away from Python for long; a signal does not wait for the end of the epoch."""
    images, labels = (np.concatenate([part] * 32) for part in program.synthetic_digits(2000, seed=0))
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    flags = "--data", "d.npz", "--batch-size", 3900, "--epochs", 30, "--output-dir", "out"
    checkpoint = tmp_path / "out" / STAGES["training"]
    with background(*flags, cwd=tmp_path, until=checkpoint) as process:
        written = checkpoint.stat().st_mtime_ns
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    assert checkpoint.stat().st_mtime_ns == written


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_and_an_ignored_one_does_not(number: int, tiny: Path, tmp_path: Path) -> None:
    """While the first one has the run tidied up, the second one has the system's own effect."""
    change = f"""
program.load_digits = lambda source: signal.raise_signal({number:d})
remove = program.remove
program.remove = lambda path: signal.getsignal(2) or signal.raise_signal(15) or remove(path)
"""
    done = run_changed(change, "--data", tiny, "--output-dir", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == -signal.SIGTERM
    before = signal.signal(number, signal.SIG_IGN)
    try:  # as of a script's background jobs, which Ctrl-C is not meant for
        with program.stop_on_signals(program.parse_config([])):
            signal.raise_signal(number)
    finally:
        assert signal.signal(number, before) == signal.SIG_IGN


RESUMABLE = "--model", "mlp", "--augment", "fast", "--dropout", 0.2, "--patience", 3, "--epochs", 4, "--batch-size", 32


@pytest.fixture(scope="module")
def stopped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders: `out`, of a run stopped after its second epoch, and `whole`, of the same run left alone."""
    folder = tmp_path_factory.mktemp("stopped")
    with killed_at(2):
        train_small(tiny, folder / "out", *RESUMABLE, "--no-plots")
    train_small(tiny, folder / "whole", *RESUMABLE, "--no-plots")
    return folder


@pytest.fixture
def again(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped / "out", tmp_path / "out"))


@pytest.mark.usefixtures("again")
def test_resume_ends_as_if_it_had_not_been_stopped(stopped: Path, train: Train) -> None:
    run = train(*RESUMABLE, "--resume")
    assert run.stderr == ""
    assert identical(run.folder, stopped / "whole")
    assert len(read_rows(run.folder / "history.csv")) == 4
    assert names(run.folder) == TABLES


@pytest.mark.slow
def test_resume_of_an_ensemble(pair: Path, train: Train) -> None:
    with killed_at(1, seed=1):
        train("--members", 2, "--epochs", 3)
    resumed = train("--members", 2, "--epochs", 3, "--resume")
    assert resumed.stdout.count("\nepoch ") == 2
    assert identical(resumed.folder, pair / "both")
    assert read_table(resumed.folder / "history.csv")["seed"].tolist() == [0, 0, 0, 1, 1, 1]


OTHER_FLAGS = """--epochs 5|--batch-size 31|--seed 1|--augment none|--rotation 11|--shift 0.1|--zoom 0|--shear 0.2
    --elastic 1|--flip|--model cnn|--learning-rate 0.004|--label-smoothing 0|--dropout 0.1|--patience 0|--members 2
    --train-limit 1199|--validation-split 0.2|--data other.npz"""


def test_resume_under_other_flags_or_on_other_data_is_refused(
    again: Path, tiny: Path, arrays: Arrays, monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", **(arrays | {"x_train": arrays["x_train"][::-1]}))
    before = tree(again)
    for flags in re.split(r"\s*[|\n]\s*", OTHER_FLAGS):
        line = refused("--data", tiny, *RESUMABLE, "--output-dir", again, "--resume", *flags.split())
        assert flags.split()[0] in line
        assert tree(again) == before


SLOW_DAMAGES = [pytest.param(damage, marks=pytest.mark.slow) for damage in ("other network", "no flags")]


@pytest.mark.parametrize("damage", ["cut", *SLOW_DAMAGES])
def test_damaged_checkpoint_costs_its_epochs_only(damage: str, stopped: Path, again: Path, train: Train) -> None:
    path = again / STAGES["training"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "other network":
        with np.load(path) as archive:
            np.savez(path, **(dict(archive) | {"arr_1": np.zeros((3, 3))}))
    else:
        path.with_name("run.json").write_text('{"seed":')
    run = train(*RESUMABLE, "--resume")
    assert identical(run.folder, stopped / "whole")
    assert damage == "no flags" or "WARNING" in only_line(run.stderr)


@posix
@pytest.mark.parametrize("size", [0, 45_000])
def test_full_disk_keeps_results(size: int, untouched: Path, tiny: Path) -> None:
    """Writing a file beyond this size fails."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert str(untouched) in refused("--data", tiny, "--model", "mlp", "--epochs", 1, "--output-dir", untouched)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("function", ["replace", "fsync", "rename"])
def test_errors_of_the_disk_keep_results(
    function: str, number: int, earlier: Path, publish: Publish, monkeypatch: Patch
) -> None:
    before = published(earlier)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, raising(OSError(number, os.strerror(number))))
        code, _, err = publish(earlier)
    assert code == 1
    assert str(earlier) in only_line(err)
    assert published(earlier) == before
    assert publish(earlier)[0] == 0


@pytest.mark.parametrize("line", ["epoch 1/1", "results  "])
def test_folder_that_vanishes_during_the_run(line: str, tiny: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    say = print

    def vanish(text: str, **options: Any) -> None:
        say(text, **options)
        if line in text:
            shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr("builtins.print", vanish)
    flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--no-plots", "--output-dir", tmp_path / "out"
    code, _, err = call(*flags)
    assert code == 1
    assert str(tmp_path / "out") in only_line(err)


@posix
@pytest.mark.parametrize("flags", ["--output-dir {}/out", "--data {}/data.npz", "--data {}", "--predict {}/digit.png"])
def test_places_that_may_not_be_entered(flags: str, mlp: Run, monkeypatch: Patch) -> None:
    """Without the right to look into a folder, a run says so in one line."""
    folder = Path(tempfile.mkdtemp())
    try:
        for name, mode in {".": 0o755, "closed": 0, "open": 0o777}.items():
            (folder / name).mkdir(exist_ok=True)
            (folder / name).chmod(mode)
        shutil.copy(mlp.model, folder)
        monkeypatch.chdir(folder / "open")
        if "--predict" in flags:
            flags += " --model-file ../model.keras"
        if os.getuid() == 0:  # who may enter anything
            os.seteuid(65534)
        code, _, err = call(*flags.format(folder / "closed").split())
        assert code == 1
        assert str(folder / "closed") in only_line(re.sub("(?m)^WARNING.*\n", "", err))
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(folder)


@posix
def test_results_are_on_disk_before_they_are_published(tmp_path: Path, publish: Publish, monkeypatch: Patch) -> None:
    """A rename may reach the disk before the content of the files does: they are flushed first."""
    flushed, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: flushed.add(os.fstat(number).st_ino) or fsync(number))
    assert publish(tmp_path)[0] == 0
    missing = {path.name for path in tmp_path.iterdir() if path.stat().st_ino not in flushed}
    assert missing <= {".lock", "runs.csv"}
    assert tmp_path.stat().st_ino in flushed


@pytest.mark.parametrize("content", [b"", b"{", None])
def test_an_empty_file_among_ready_results_blocks_nothing(content: Any, earlier: Path, publish: Publish) -> None:
    """As after a power loss on a disk that lies about what it has written."""
    (earlier / ".ready").mkdir()
    for name in ("metrics.json", "replaced") if content is not None else ():
        (earlier / ".ready" / name).write_bytes(content)
    assert publish(earlier)[0] == 0
    assert (earlier / "model.keras").read_text() == "new model.keras"


@pytest.mark.parametrize("kind", ["memory", "device memory", "disk"])
def test_errors_of_the_machine_are_one_line(kind: str, tiny: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    error, named = {
        "memory": (MemoryError(), "--batch-size"),
        "device memory": (program.tf.errors.ResourceExhaustedError(None, None, "OOM " * 999), "--batch-size"),
        "disk": (OSError(errno.EIO, "Input/output error", "/somewhere/else"), "/somewhere/else"),
    }[kind]
    monkeypatch.setattr(program, "build_model", raising(error))
    assert named in refused("--data", tiny, "--no-plots", "--output-dir", tmp_path / "out")


@posix
def test_an_abort_while_tensorflow_is_imported_is_not_silent(tmp_path: Path) -> None:
    """As on a CPU without AVX."""
    (tmp_path / "tensorflow.py").write_text("import os; os.write(2, b'chatter'); os.abort()")
    done = cli("--data", "synthetic", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == -signal.SIGABRT
    assert "tensorflow" in done.stderr


@posix
@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["<&- >&- 2>&-", ">/dev/full", "2>&1 | true"])
def test_closed_or_full_streams_do_not_lose_the_run(redirect: str, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"\xff\xfe \n")  # a file name is any bytes
    flags = "--data", tiny, "--model", "mlp", "--epochs", 2, "--no-plots", "--output-dir", out
    done = cli(*flags, cwd=tmp_path, shell=f'{{ "$@"; echo $? >code; }} {redirect}')
    assert is_whole(out), done.stderr
    assert (tmp_path / "code").read_text() == "0\n"
    assert done.stderr == ""
    assert len(read_rows(out / "runs.csv")) == 1


@pytest.mark.slow
@posix
def test_a_closed_pipe_does_not_lose_predictions(earlier: Path, tmp_path: Path) -> None:
    """Not even where each picture is worth a line of complaint."""
    for index in range(600):
        (tmp_path / f"{index:03}-{'n' * 200}.png").write_bytes(b"")
    through = '{ "$@"; echo $? >code; } 2>&1 | head -1'
    done = cli("--predict", ".", "--output-dir", earlier, cwd=tmp_path, shell=through)
    assert "Traceback" not in done.stdout
    assert (tmp_path / "code").read_text() == "1\n"
    assert len(read_rows(earlier / "external_predictions.csv")) == 600


def test_each_finished_run_adds_a_row(train: Train, tiny: Path, tmp_path: Path) -> None:
    """Also where --min-accuracy is missed: everything is written all the same. Rows are never rewritten."""
    out, seen = train("--min-accuracy", 1, code=3).folder, ""
    assert names(out) == TABLES
    for minimum, expected in ((1, 3), (0, 0)):
        flags = "--evaluate", "--data", tiny, "--output-dir", out, "--no-plots", "--quiet", "--min-accuracy", minimum
        code, stdout, err = call(*flags)
        assert (code, err) == (expected, "")
        assert ("BELOW" in only_line(stdout)) == (expected == 3)
        assert (out / "runs.csv").read_text().startswith(seen)
        seen = (out / "runs.csv").read_text()
    refused("--data", tmp_path / "nowhere", "--output-dir", out)
    assert (out / "runs.csv").read_text() == seen
    assert [row["exit_code"] for row in read_rows(out / "runs.csv")] == ["3", "3", "0"]


def test_checkpoints_that_cannot_be_removed_cost_nothing(train: Train, monkeypatch: Patch) -> None:
    """As on a network file system that keeps files which are still open; the results are in place by then."""
    remove_folder = os.rmdir

    def rmdir(path: Any, **options: Any) -> None:
        if Path(path).name == ".checkpoint":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        remove_folder(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    run = train()
    assert run.stderr == ""
    assert len(read_rows(run.folder / "runs.csv")) == 1


# Ensembles, several devices


@pytest.fixture(scope="module")
def pair(mlp: Run, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one` and `two` of runs with seeds 0 and 1, and `both` of a run with both as members."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "one").symlink_to(mlp.folder)
    for name, *flags in (("two", "--seed", 1), ("both", "--members", 2)):
        train_small(tiny, folder / name, "--epochs", 3, "--no-plots", *flags)
    return folder


def test_ensemble_is_one_plain_model(pair: Path, tiny: Path, arrays: Arrays, tmp_path: Path) -> None:
    """Trained at once or joined later, it is the same; and an ensemble may be a member again."""
    images, flags = arrays["x_test"], ("--data", tiny, "--no-plots", "--quiet", "--output-dir")
    both = probabilities(pair / "both" / "model.keras", images)
    assert both.shape == (300, 10)
    assert call(*flags, tmp_path / "joined", "--combine", pair / "one", pair / "two")[0] == 0
    joined = probabilities(tmp_path / "joined" / "model.keras", images)
    np.testing.assert_allclose(joined, both, atol=0.01)  # temperatures are fitted, not computed
    one, metrics = read_metrics(pair / "one"), read_metrics(tmp_path / "joined")
    assert metrics["parameters"] == read_metrics(pair / "both")["parameters"] == 2 * one["parameters"]
    assert len(read_rows(tmp_path / "joined" / "runs.csv")) == 1
    assert call(*flags, tmp_path / "again", "--combine", tmp_path / "joined", pair / "one")[0] == 0
    assert probabilities(tmp_path / "again" / "model.keras", images).sum(1) == pytest.approx(1, abs=1e-4)
    assert call(*flags, tmp_path / "again", "--evaluate")[0] == 0


def test_refused_ensembles(pair: Path, untouched: Path, tiny: Path, arrays: Arrays, tmp_path: Path) -> None:
    """Of folders without a model, of models that do not fit, and calibrated on images a member was trained on."""
    for name in ("empty", "text", "foreign", "headless"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "model.keras").write_text("no model")
    strange_model("code", tmp_path / "foreign" / "model.keras")
    headless = [keras.Input((28, 28, 1)), keras.layers.Conv2D(10, 28), keras.layers.Reshape((10,))]
    keras.Sequential(headless).save(tmp_path / "headless" / "model.keras")
    np.savez(tmp_path / "other.npz", **(arrays | {"x_train": arrays["x_train"][::-1]}))
    flags = "--data", tiny, "--output-dir", untouched, "--combine", pair / "one"
    for name in ("missing", "empty", "text", "foreign", "headless"):
        message = refused(*flags, tmp_path / name)
        assert name in message, name
        assert "--model-file" not in message  # which does not go with --combine
    assert "one" in refused(*flags, pair / "two", "--data", tmp_path / "other.npz")
    for more in (("--validation-split", 0.2), ("--train-limit", 1000)):
        assert "--validation-split" in refused(*flags, pair / "two", *more)


@pytest.mark.slow
def test_mirrored_strategy_learns_as_one_device_does(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys, tensorflow as tf; cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n"
        "import mnist_digit_recognizer as program; sys.exit(program.main(sys.argv[1:]))"
    )
    accuracy, environment = {}, os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    for strategy in ("none", "mirrored"):
        flags = f"--data {tiny} --epochs 4 --batch-size 64 --no-plots --strategy {strategy} --output-dir {strategy}"
        command = [sys.executable, "-c", code, *flags.split()]
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
        accuracy[strategy] = read_metrics(tmp_path / strategy)["test_accuracy"]
    assert accuracy["none"] > 0.5
    assert accuracy["mirrored"] == pytest.approx(accuracy["none"], abs=0.2)
