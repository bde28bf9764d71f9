"""Tests of mnist_digit_recognizer.py.

    pytest                                        # a few minutes, no network, no MNIST
    MNIST_DATA=mnist.npz pytest -m "slow or not slow"   # all, on the real data set

They run on the CPU; CUDA_VISIBLE_DEVICES=0 TF_FORCE_GPU_ALLOW_GROWTH=true runs them on a GPU.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import gzip
import hashlib
import io
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
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

import mnist_digit_recognizer as program

SCRIPT = Path(program.__file__).resolve()
ROOT = SCRIPT.parent
MNIST = os.environ.get("MNIST_DATA", "")
needs_mnist = pytest.mark.skipif(not MNIST, reason="MNIST_DATA names no copy of MNIST")

TABLES = {"model.keras", "metrics.json", "history.csv", "predictions.csv", "runs.csv"}
EVALUATION_PICTURES = {"confusion_matrix.png", "predictions.png", "misclassified.png", "calibration.png"}
PICTURES = EVALUATION_PICTURES | {"samples.png", "pixels.png", "augmentation.png", "training_curves.png"}


class Run(NamedTuple):
    """A finished run: its output folder, what it printed, and its metrics.json."""

    folder: Path
    stdout: str
    stderr: str
    metrics: dict[str, Any]


Arrays = dict[str, np.ndarray]
Change = Callable[[np.ndarray], np.ndarray]
Train = Callable[..., Run]
Capture = pytest.CaptureFixture[str]


# What the tests share


def cli(*arguments: object, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as its users do, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error."""
    capsys.readouterr()
    try:
        code = program.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line on standard error of a run that fails."""
    code, out, err = call(capsys, "--quiet", *arguments)
    assert (code, out) == (1, "")
    return only_line(err)


def only_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert text.endswith("\n")
    assert "Traceback" not in text
    return text.strip()


def tree(folder: Path) -> dict[str, bytes]:
    """The content of each file in a folder and below, hidden ones too; but not who held the folder last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder: Path) -> set[str]:
    """What is in a folder, hidden or not, the lock aside."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json, which must be strict JSON: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.json")

    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)


def read_table(path: Path) -> dict[str, np.ndarray]:
    """A CSV file of numbers, by column."""
    with open(path, newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    return dict(zip(header, np.array(rows, float).T, strict=True))


def weights(path: Path) -> list[np.ndarray]:
    return program.load_model(path).get_weights()


def equal_arrays(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def flags_of_help() -> dict[str, str]:
    """What --help says of each flag."""
    text = program.build_parser().format_help()
    parts = re.split(r"^  (?:-h, )?(?=--[a-z])", text.partition("\noptions:")[2], flags=re.MULTILINE)[1:]
    return {re.match(r"--[a-z-]+", part)[0]: " ".join(part.split()) for part in parts}


@pytest.fixture(scope="session", autouse=True)
def _no_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No download can succeed, and no cache of the user's is read or written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            patch.delenv(name, raising=False)
        if "CUDA_VISIBLE_DEVICES" not in os.environ:
            patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(scope="session")
def arrays() -> Arrays:
    """1,200 training and 300 test images."""
    images, labels = program.synthetic_digits(1500, seed=1)
    parts = images[:1200], labels[:1200], images[1200:], labels[1200:]
    return dict(zip(program.NPZ_KEYS, parts, strict=True))


@pytest.fixture(scope="session")
def tiny(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training run with all results, in a process of its own."""
    cwd = tmp_path_factory.mktemp("trained")
    done = cli("--data", tiny, "--epochs", 3, "--batch-size", 32, "--seed", 7, "--output-dir", "out", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return Run(cwd / "out", done.stdout, done.stderr, read_metrics(cwd / "out"))


@pytest.fixture
def earlier(trained: Run, tmp_path: Path) -> Path:
    """An output folder that already holds results."""
    return Path(shutil.copytree(trained.folder, tmp_path / "earlier"))


@pytest.fixture
def train(tiny: Path, tmp_path: Path, capsys: Capture) -> Train:
    """Train the small network in this process, with the flags given."""

    def run(*flags: object, code: int = 0, name: str = "out", plots: bool = False) -> Run:
        defaults = "--data", tiny, "--model", "mlp", "--epochs", 1, "--output-dir", tmp_path / name
        result = call(capsys, *defaults, *([] if plots else ["--no-plots"]), *flags)
        assert result[0] == code, result
        return Run(tmp_path / name, result[1], result[2], read_metrics(tmp_path / name))

    return run


# Data: what is read


def write_idx(folder: Path, arrays: Arrays, dot: str = "-", zipped: bool = False) -> Path:
    """The four files of MNIST's own format."""
    folder.mkdir(exist_ok=True)
    for stem, array in zip(program.IDX_NAMES, arrays.values(), strict=True):
        kind, magic = ("idx3", 2051) if array.ndim == 3 else ("idx1", 2049)
        content = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
        path = folder / f"{stem}{dot}{kind}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content, 1) if zipped else content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_folder(arrays: Arrays, tmp_path: Path, dot: str, zipped: bool) -> None:
    digits = program.load_digits(str(write_idx(tmp_path / "digits", arrays, dot, zipped)))
    assert equal_arrays(list(digits[:4]), list(arrays.values()))
    assert digits.name == "digits"


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64, np.uint64, ">i4"])
def test_npz(arrays: Arrays, tmp_path: Path, dtype: Any) -> None:
    """Labels may be whole numbers of any type; other arrays in the file do not matter."""
    labels = {key: arrays[key].astype(dtype) for key in ("y_train", "y_test")}
    np.savez(tmp_path / "some.digits.npz", **(arrays | labels), other=np.array([{}], object))
    digits = program.load_digits(str(tmp_path / "some.digits.npz"))
    assert equal_arrays(list(digits[:4]), list(arrays.values()))
    assert all(array.dtype == np.uint8 for array in digits[:4])
    assert digits.name == "some.digits"


@pytest.mark.parametrize("name", ["mnist", "synthetic"])
def test_a_name_makes_no_mnist(name: str, arrays: Arrays, tmp_path: Path) -> None:
    """Digits of one's own are not taken for a data set that has the name of their file."""
    np.savez(tmp_path / f"{name}.npz", **arrays)
    write_idx(tmp_path / name, arrays)
    for path in (tmp_path / f"{name}.npz", tmp_path / name):
        assert program.load_digits(str(path)).name not in ("mnist", "synthetic")


def fake_synthetic(origin: str) -> program.Digits:
    """The built-in digits, but few of them."""
    images, labels = program.synthetic_digits(260, seed=0)
    return program.Digits(images[:200], labels[:200], images[200:], labels[200:], "synthetic", origin)


def test_synthetic(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    monkeypatch.setattr(program, "load_synthetic", fake_synthetic)
    run = train("--data", "synthetic")
    assert run.metrics["dataset"]["name"] == "synthetic"
    assert run.stderr == ""


def test_auto_without_network_takes_synthetic_digits(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    monkeypatch.setattr(program, "load_synthetic", fake_synthetic)
    run = train("--data", "auto")
    assert run.metrics["dataset"]["name"] == "synthetic"
    assert "synthetic" in run.stderr.lower()
    assert "Traceback" not in run.stderr
    assert "synthetic" in run.stdout.splitlines()[-1].lower()
    train("--data", "auto")  # its own earlier results may be replaced


def test_auto_keeps_results_on_other_data(monkeypatch: pytest.MonkeyPatch, earlier: Path, capsys: Capture) -> None:
    monkeypatch.setattr(program, "load_synthetic", fake_synthetic)
    before = tree(earlier)
    code, _, err = call(capsys, "--data", "auto", "--model", "mlp", "--epochs", 1, "--output-dir", earlier)
    assert code == 1
    assert str(earlier) in err.splitlines()[-1]
    assert "Traceback" not in err
    assert tree(earlier) == before


def test_mnist_without_network(arrays: Arrays, tmp_path: Path) -> None:
    """Another data set in the cache is not taken for MNIST."""
    (tmp_path / "keras" / "datasets").mkdir(parents=True)
    np.savez(tmp_path / "keras" / "datasets" / "mnist.npz", **arrays)
    done = cli("--data", "mnist", "--quiet", cwd=tmp_path, KERAS_HOME=str(tmp_path / "keras"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "mnist" in only_line(done.stderr).lower()


@needs_mnist
def test_mnist_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy in the cache is taken without a download, however it was zipped; under any name it is still MNIST."""
    (tmp_path / "datasets").mkdir()
    with np.load(MNIST) as content:
        np.savez(tmp_path / "datasets" / "mnist.npz", **content)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(program, "download_mnist", lambda cache: pytest.fail("downloads"))
    for source in ("auto", "mnist"):
        digits = program.load_digits(source)
        assert digits.name == "mnist"
        assert [len(array) for array in digits[:4]] == [60_000, 60_000, 10_000, 10_000]
    (tmp_path / "datasets" / "mnist.npz").rename(tmp_path / "other.npz")
    assert program.load_digits(str(tmp_path / "other.npz")).name == "mnist"


# Data: what is refused


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def replaced(key: str, change: Change) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {key: change(arrays[key])}


def with_label(label: int, dtype: Any) -> Change:
    return lambda labels: np.r_[labels[1:].astype(dtype), np.array([label], dtype)]


WRONG_ARRAYS = {
    "flat images": replaced("x_train", lambda x: x.reshape(len(x), 784)),
    "wide images": replaced("x_test", lambda x: np.pad(x, ((0, 0), (2, 2), (2, 2)))),
    "images with a channel": replaced("x_train", lambda x: x[..., None]),
    "float images": replaced("x_train", lambda x: x / 255),
    "signed images": replaced("x_test", lambda x: x.astype(np.int16)),
    "no images": replaced("x_train", lambda x: x[:0]),
    "float labels": replaced("y_train", lambda y: y.astype(float)),
    "text labels": replaced("y_test", lambda y: y.astype(str)),
    "true-or-false labels": replaced("y_test", lambda y: y > 4),
    "one-hot labels": replaced("y_train", lambda y: np.eye(10, dtype=int)[y]),
    "label 10": replaced("y_train", with_label(10, np.uint8)),
    "label 255": replaced("y_test", with_label(255, np.uint8)),
    "label 256": replaced("y_test", with_label(256, np.int64)),
    "label -1": replaced("y_test", with_label(-1, np.int8)),
    "too few labels": replaced("y_train", lambda y: y[:-1]),
    "too few images": replaced("x_test", lambda x: x[:-1]),
    "training images without a 3": replaced("y_train", lambda y: np.where(y == 3, 5, y)),
    "test images without a 0": replaced("y_test", lambda y: np.where(y == 0, 1, y)),
    "swapped": lambda arrays: dict(zip(arrays, [*arrays.values()][::-1], strict=True)),
    "missing array": lambda arrays: {key: array for key, array in arrays.items() if key != "y_test"},
    "no array": lambda arrays: {},
}


@pytest.mark.parametrize("fault", WRONG_ARRAYS)
def test_npz_of_something_else(fault: str, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "bad.npz", **WRONG_ARRAYS[fault](arrays))
    assert "bad.npz" in refused(capsys, "--data", tmp_path / "bad.npz", "--output-dir", tmp_path / "out")


def flip_bytes(content: bytes, share: float) -> bytes:
    """Damage 20 bytes at that share of the content."""
    place = int(len(content) * share)
    return content[:place] + bytes(byte ^ 255 for byte in content[place : place + 20]) + content[place + 20 :]


def zipped_headers(folder: Path, x_train: bytes) -> bytes:
    """An .npz file whose images are a header and little else."""
    with zipfile.ZipFile(folder / "headers.zip", "w") as archive:
        for key in program.NPZ_KEYS:
            archive.writestr(f"{key}.npy", x_train if key == "x_train" else npy_header((0,)))
    return (folder / "headers.zip").read_bytes()


DAMAGED_NPZ = {
    "empty": lambda good, folder: b"",
    "text": lambda good, folder: b"x_train, y_train\n1, 2\n",
    "picture": lambda good, folder: b"\x89PNG\r\n\x1a\n" + bytes(1000),
    "cut": lambda good, folder: good[: len(good) // 2],
    "cut at the end": lambda good, folder: good[:-10],
    "damaged member": lambda good, folder: flip_bytes(good, 0.4),
    "damaged index": lambda good, folder: flip_bytes(good, 0.9999),
    "huge": lambda good, folder: zipped_headers(folder, npy_header((10**12, 28, 28))),
    "huge values": lambda good, folder: zipped_headers(folder, npy_header((10, 28, 28), "|S1000000000")),
    "too huge to count": lambda good, folder: zipped_headers(folder, npy_header((10**30, 28, 28))),
    "negative": lambda good, folder: zipped_headers(folder, npy_header((-1, 28, 28))),
    "promised but missing": lambda good, folder: zipped_headers(folder, npy_header((1000, 28, 28))),
    "header cut": lambda good, folder: zipped_headers(folder, npy_header((10, 28, 28))[:20]),
    "not .npy": lambda good, folder: zipped_headers(folder, b"no array at all"),
}


@pytest.mark.parametrize("stored", [False, True], ids=["compressed", "stored"])
@pytest.mark.parametrize("fault", DAMAGED_NPZ)
def test_damaged_npz(fault: str, stored: bool, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "bad.npz"
    (np.savez if stored else np.savez_compressed)(path, **arrays)
    path.write_bytes(DAMAGED_NPZ[fault](path.read_bytes(), tmp_path))
    started = time.perf_counter()
    assert "bad.npz" in refused(capsys, "--data", path, "--output-dir", tmp_path / "out")
    assert time.perf_counter() - started < 10


def test_nothing_is_unpickled(arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    marker, path = tmp_path / "marker", tmp_path / "bad.npz"
    np.savez(path, **(arrays | {"x_train": np.array([Payload(marker)], object)}))
    assert "bad.npz" in refused(capsys, "--data", path, "--output-dir", tmp_path / "out")
    assert not marker.exists()
    with np.load(path, allow_pickle=True) as content:
        content["x_train"]
    assert marker.exists()  # so it would have shown


def idx(magic: int, *shape: int, size: int) -> Callable[[bytes], bytes]:
    return lambda good: struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(size)


DAMAGED_IDX = {
    "empty": lambda good: b"",
    "header cut": lambda good: good[:10],
    "cut": lambda good: good[:-1],
    "too long": lambda good: good + b"\0",
    "no IDX": idx(0x12345678, 300, 28, 28, size=300 * 784),
    "of floats": idx(0x0D03, 300, 28, 28, size=300 * 784 * 4),
    "other size": idx(2051, 300, 27, 28, size=300 * 27 * 28),
    "labels": idx(2049, 300, size=300),
    "huge": idx(2051, 2**32 - 1, 28, 28, size=300 * 784),
    "huge images": idx(2051, 300, 2**31, 2**31, size=300 * 784),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("fault", DAMAGED_IDX)
def test_damaged_idx(fault: str, zipped: bool, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    path = write_idx(tmp_path, arrays) / "t10k-images-idx3-ubyte"
    content = DAMAGED_IDX[fault](path.read_bytes())
    if zipped:
        path.unlink()
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content, 1)
    path.write_bytes(content)
    assert path.name in refused(capsys, "--data", tmp_path, "--output-dir", tmp_path / "out")


@pytest.mark.parametrize("share", [0.5, 0.9999, None], ids=["damaged", "wrong checksum", "cut"])
def test_damaged_gzip(share: float | None, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    path = write_idx(tmp_path, arrays, zipped=True) / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(flip_bytes(content, share) if share else content[: len(content) // 2])
    assert path.name in refused(capsys, "--data", tmp_path, "--output-dir", tmp_path / "out")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_missing_idx(name: str, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    (write_idx(tmp_path, arrays) / name).unlink()
    assert name in refused(capsys, "--data", tmp_path, "--output-dir", tmp_path / "out")


def test_swapped_idx(arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    images, labels = (write_idx(tmp_path, arrays) / f"train-{end}-ubyte" for end in ("images-idx3", "labels-idx1"))
    content = images.read_bytes(), labels.read_bytes()
    labels.write_bytes(content[0])
    images.write_bytes(content[1])
    assert images.name in refused(capsys, "--data", tmp_path, "--output-dir", tmp_path / "out")


@pytest.mark.parametrize("name", ["nowhere.npz", "nowhere/digits", "empty", "n" * 5000])
def test_missing_data(name: str, earlier: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    before = tree(earlier)
    assert name in refused(capsys, "--data", tmp_path / name, "--output-dir", earlier)
    assert tree(earlier) == before


def test_missing_data_from_the_shell(tmp_path: Path) -> None:
    done = cli("--data", "nowhere.npz", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere.npz" in only_line(done.stderr)


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
    --predict x.png --min-accuracy 0.5|--resume --evaluate|--combine a"""


@pytest.mark.parametrize("line", [*re.split(r"\s*[|\n]\s*", WRONG_FLAGS.strip()), f"--seed 1{'0' * 400}"])
def test_wrong_flag(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *line.split())
    assert (code, out) == (2, "")
    flag = "yes" if line == "--flip yes" else line.split()[0]
    assert flag in only_line(err)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("line", "code"), [("--help", 0), ("--version", 0), ("--epochs 0", 2)])
def test_quick_answers(line: str, code: int, tmp_path: Path) -> None:
    """Nothing that is slow to import is imported."""
    command = [sys.executable, "-X", "importtime", str(SCRIPT), *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert not re.search(r"\| +(tensorflow|keras|matplotlib|scipy|PIL)\b", done.stderr)


def test_version_and_help(capsys: Capture) -> None:
    assert program.VERSION in call(capsys, "--version")[1]
    defaults = vars(program.parse_config([]))
    for flag, text in flags_of_help().items():
        value = defaults.get(flag[2:].replace("-", "_"))
        if value is not None and not isinstance(value, bool) and flag != "--model-file":
            assert f"default: {value}" in text, f"--help does not tell the default of {flag}"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_output_folder_that_cannot_be(place: str, tmp_path: Path, tiny: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("keep me")
    assert str(tmp_path / place) in refused(capsys, "--data", tiny, "--output-dir", tmp_path / place)
    assert tree(tmp_path) == {"file": b"keep me"}


# Preprocessing


def test_normalise() -> None:
    images = np.arange(256, dtype=np.uint8).repeat(49).reshape(16, 28, 28)
    result = program.normalise(images)
    assert (result.shape, result.dtype) == ((16, 28, 28, 1), np.float32)
    assert np.array_equal(np.unique(result), np.arange(256, dtype=np.float32) / 255)
    assert images.dtype == np.uint8


@pytest.mark.parametrize(
    ("limit", "split", "sizes"), [(None, 0.1, (1080, 120)), (100, 0.25, (75, 25)), (2, 0.5, (1, 1))]
)
def test_split_validation(limit: int | None, split: float, sizes: tuple[int, int], arrays: Arrays) -> None:
    """The first images are trained on, the last held out, and none is lost."""
    x_train, y_train, x_validation, y_validation = program.split_validation(
        program.Digits(*arrays.values(), "tiny", "here"), split, limit
    )
    assert (len(x_train), len(x_validation)) == sizes
    assert np.array_equal(np.concatenate([x_train, x_validation]), arrays["x_train"][:limit])
    assert np.array_equal(np.concatenate([y_train, y_validation]), arrays["y_train"][:limit])


@pytest.mark.parametrize(("limit", "split"), [(2, 0.1), (2, 0.9), (None, 0.0001), (None, 0.9999)])
def test_split_that_leaves_nothing(
    limit: int | None, split: float, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    limits = [] if limit is None else ["--train-limit", limit]
    flags = "--data", tiny, "--validation-split", split, *limits, "--output-dir", tmp_path
    assert "--validation-split" in refused(capsys, *flags)


# Augmentation

STILL = program.Ranges(rotation=0, shift=0, zoom=0, shear=0, elastic=0, flip=False)
STRONG = program.Ranges(rotation=15, shift=0.1, zoom=0.2, shear=0.2, elastic=1, flip=True)


def augmented(images: np.ndarray, ranges: program.Ranges, seed: tuple[int, int] = (1, 2)) -> np.ndarray:
    return program.augment_fast(images, ranges, np.array(seed, np.int32)).numpy()


def moved(images: np.ndarray, seed: tuple[int, int] = (1, 2), **ranges: Any) -> np.ndarray:
    return program.move(images, STILL._replace(**ranges), np.array(seed, np.int32)).numpy()


def centres(images: np.ndarray) -> np.ndarray:
    """The centre of mass of each image, (n, 2): row, column."""
    mass = images.reshape(-1, 28, 28).astype(float)
    places = np.arange(28)
    total = mass.sum((1, 2))
    return np.stack([mass.sum(2) @ places / total, mass.sum(1) @ places / total], axis=1)


@pytest.fixture(scope="session")
def batch(arrays: Arrays) -> np.ndarray:
    return program.normalise(arrays["x_train"][:256])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 256])
def test_augmented_images(count: int, batch: np.ndarray) -> None:
    result = augmented(batch[:count], STRONG)
    assert (result.shape, result.dtype) == ((count, 28, 28, 1), np.float32)
    assert np.isfinite(result).all()
    assert result.min() >= 0
    assert result.max() <= 1
    assert not np.array_equal(result, batch[:count])


def test_augmentation_is_a_function_of_its_seed(batch: np.ndarray) -> None:
    result = augmented(batch, STRONG)
    assert np.array_equal(result, augmented(batch, STRONG))
    for seed in ((1, 3), (2, 2)):
        other = augmented(batch, STRONG, seed)
        assert np.mean([not np.array_equal(a, b) for a, b in zip(result, other, strict=True)]) > 0.9


def test_augmentation_differs_within_a_batch(batch: np.ndarray) -> None:
    same = np.repeat(batch[:1], 50, axis=0)
    assert len(np.unique(moved(same, rotation=10, shift=0.1), axis=0)) == 50
    assert len(np.unique(augmented(same, STRONG), axis=0)) == 50


def test_ranges_of_zero_move_nothing(batch: np.ndarray) -> None:
    assert np.allclose(moved(batch), batch, atol=1e-5)


def test_light_alone(batch: np.ndarray) -> None:
    """Without ranges some images are left as they are, and some are not."""
    same = [np.allclose(a, b, atol=1e-5) for a, b in zip(batch, augmented(batch, STILL), strict=True)]
    assert 0.05 < np.mean(same) < 0.9


def test_the_middle_stays_in_the_middle(batch: np.ndarray) -> None:
    distance = np.abs(centres(moved(batch, rotation=10, zoom=0.1, shear=0.1)) - centres(batch))
    assert distance.max() < 0.8


def test_shift(batch: np.ndarray) -> None:
    small = moved(np.pad(batch[:, 7:21, 7:21], ((0, 0), (7, 7), (7, 7), (0, 0))), shift=0.1)
    distance = centres(small) - centres(np.pad(batch[:, 7:21, 7:21], ((0, 0), (7, 7), (7, 7), (0, 0))))
    assert np.abs(distance).max() <= 2.81
    assert np.abs(distance).max(axis=0).min() > 2
    assert np.abs(distance.mean(axis=0)).max() < 0.5


def test_zoom(batch: np.ndarray) -> None:
    """Ink grows and shrinks with the area, by the given share in each direction at the most."""
    growth = moved(batch, zoom=0.2).sum((1, 2, 3)) / batch.sum((1, 2, 3))
    assert 0.6 < growth.min() < 0.85
    assert 1.15 < growth.max() < 1.6


def test_rotation(batch: np.ndarray) -> None:
    """A bar turns to both sides, up to the given angle."""
    bars = np.zeros((200, 28, 28, 1), np.float32)
    bars[:, 4:24, 13:15] = 1
    rows, columns = np.indices((28, 28)) - 13.5
    turned = moved(bars, rotation=20)[..., 0]
    angles = np.degrees((turned * rows * columns).sum((1, 2)) / (turned * rows**2).sum((1, 2)))
    assert 15 < angles.max() < 21
    assert -21 < angles.min() < -15


def test_flip_mirrors_half(batch: np.ndarray) -> None:
    result = moved(batch, flip=True)
    same, mirrored = (np.abs(result - other).max((1, 2, 3)) < 1e-4 for other in (batch, batch[:, :, ::-1]))
    assert (same | mirrored).all()
    assert 0.3 < mirrored.mean() < 0.7


def test_elastic_bends(batch: np.ndarray) -> None:
    """The strokes go elsewhere, not far, and stay strokes."""
    bent = program.distort(batch, 1.0, np.array([1, 2], np.int32)).numpy()
    assert bent.shape == batch.shape
    assert (np.abs(bent - batch).max((1, 2, 3)) > 0.1).all()
    assert np.abs(centres(bent) - centres(batch)).mean() < 1
    assert 0.8 < bent.sum() / batch.sum() < 1.2


@pytest.mark.parametrize("how", ["keras", "none"])
def test_other_augmentation(how: str, train: Train) -> None:
    """It trains, draws its picture, and does the same again."""
    flags = "--augment", how, "--train-limit", 300, "--flip", "--rotation", 20
    one, two = train(*flags, name="one"), train(*flags, name="two")
    assert equal_arrays(weights(one.folder / "model.keras"), weights(two.folder / "model.keras"))
    assert one.metrics["config"]["augment"] == how


def test_none_leaves_images_alone(batch: np.ndarray) -> None:
    augment = program.augmentation(program.parse_config(["--augment", "none"]))
    assert np.array_equal(augment(batch, np.array([0, 0], np.int32)), batch)


def images_per_second(next_batch: Callable[[], Any], batches: int) -> float:
    next_batch()
    started = time.perf_counter()
    for _ in range(batches):
        next_batch()
    return 128 * batches / (time.perf_counter() - started)


@pytest.mark.slow
def test_augmentation_is_fast(batch: np.ndarray) -> None:
    """In tf.data, as training uses it, many times the images per second of Keras' ImageDataGenerator.

    On two free cores it is about nine times; the bound leaves room for a machine that has other work to do.
    """
    import tensorflow as tf

    ranges = program.Ranges(rotation=10, shift=0.08, zoom=0.1, shear=0.1, elastic=0, flip=False)
    images = tf.constant(batch[:128])
    steps = tf.data.Dataset.range(10**9).map(
        lambda step: program.augment_fast(images, ranges, tf.stack([0, tf.cast(step, tf.int32)])),
        num_parallel_calls=os.cpu_count(),
    )
    generator = tf.keras.preprocessing.image.ImageDataGenerator(
        rotation_range=10,
        width_shift_range=0.08,
        height_shift_range=0.08,
        zoom_range=0.1,
        shear_range=math.degrees(math.atan(0.1)),
        fill_mode="constant",
    )
    fast, flow = iter(steps), generator.flow(batch[:128], batch_size=128, shuffle=False)
    ratios = [images_per_second(lambda: next(fast), 200) / images_per_second(lambda: next(flow), 10) for _ in range(5)]
    assert max(ratios) >= 4, ratios


# Models


def kinds(model: Any) -> list[str]:
    return [type(layer).__name__ for layer in model.layers]


def test_cnn() -> None:
    model = program.build_model("cnn", dropout=0.3, seed=0)
    assert {"Conv2D", "MaxPooling2D", "ReLU", "Flatten", "Dense", "Dropout"} <= set(kinds(model))
    assert kinds(model)[-1] == "Softmax"
    assert (model.input_shape, model.output_shape) == ((None, 28, 28, 1), (None, 10))


def test_mlp() -> None:
    model = program.build_model("mlp", dropout=0, seed=0)
    dense = [layer for layer in model.layers if type(layer).__name__ == "Dense"]
    assert [layer.units for layer in dense] == [10, 10, 10, 10]
    assert [layer.activation.__name__ for layer in dense[:3]] == ["relu"] * 3
    assert model.count_params() == 784 * 10 + 10 + 3 * 110


def test_first_weights_come_from_the_seed() -> None:
    one, same, other = (program.build_model("cnn", 0, seed).get_weights() for seed in (1, 1, 2))
    assert equal_arrays(one, same)
    assert not equal_arrays(one, other)


# Training


def test_same_seed_same_weights(trained: Run, tiny: Path, tmp_path: Path) -> None:
    """A second run, in another process, is bit-equal; without plots it draws none; quiet, it prints one line."""
    flags = "--epochs", 3, "--batch-size", 32, "--seed", 7, "--output-dir", tmp_path / "out", "--no-plots", "--quiet"
    done = cli("--data", tiny, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert only_line(done.stdout) == trained.stdout.splitlines()[-1]
    assert names(tmp_path / "out") == TABLES
    assert equal_arrays(weights(tmp_path / "out" / "model.keras"), weights(trained.folder / "model.keras"))
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == (trained.folder / "predictions.csv").read_bytes()


def test_other_seed_other_weights(train: Train) -> None:
    one, same, other = (train("--seed", seed, name=f"{name}") for name, seed in enumerate((1, 1, 2)))
    assert equal_arrays(weights(one.folder / "model.keras"), weights(same.folder / "model.keras"))
    assert not equal_arrays(weights(one.folder / "model.keras"), weights(other.folder / "model.keras"))


def test_mlp_end_to_end(train: Train, trained: Run) -> None:
    run = train("--epochs", 15, "--batch-size", 32, "--learning-rate", 0.01, "--dropout", 0.01, "--elastic", 0.2)
    assert run.metrics["parameters"] == 8180
    assert run.metrics["test_accuracy"] > 0.3
    assert run.metrics.keys() == trained.metrics.keys()


@pytest.mark.parametrize("limit", [2, 12])
def test_few_images(limit: int, train: Train) -> None:
    """Not every digit is among them, and they do not fill a batch."""
    run = train("--train-limit", limit, "--validation-split", 0.5, plots=True)
    assert names(run.folder) == TABLES | PICTURES


@pytest.mark.parametrize(("patience", "epochs", "stops"), [(1, 60, True), (60, 6, False)])
def test_patience_keeps_the_best_weights(patience: int, epochs: int, stops: bool, train: Train, arrays: Arrays) -> None:
    """At this learning rate the validation loss soon gets worse; the model saved is the one of the best epoch."""
    flags = "--epochs", epochs, "--learning-rate", 0.3, "--label-smoothing", 0, "--batch-size", 32
    run = train(*flags, "--patience", patience)
    history = read_table(run.folder / "history.csv")
    assert (len(history["epoch"]) < epochs) == stops
    probabilities = program.predict_probabilities(
        program.load_model(run.folder / "model.keras"), arrays["x_train"][-120:]
    )
    raw = np.log(np.maximum(probabilities, 1e-30)) * run.metrics["temperature"]  # as before calibration
    raw = np.exp(raw - raw.max(axis=1, keepdims=True))
    evaluation = program.Evaluation(arrays["y_train"][-120:], raw / raw.sum(axis=1, keepdims=True))
    assert program.cross_entropy(evaluation) == pytest.approx(history["val_loss"].min(), rel=1e-3)


@pytest.mark.parametrize(("batch_size", "epochs"), [(32, 2), (2000, 1)])
def test_loss_that_is_no_number(batch_size: int, epochs: int, earlier: Path, tiny: Path, capsys: Capture) -> None:
    """In the middle of training, or only after the last step, where validation is the first to notice."""
    before = tree(earlier)
    flags = "--data", tiny, "--model", "mlp", "--epochs", epochs, "--learning-rate", 1e38, "--batch-size", batch_size
    assert "--learning-rate" in refused(capsys, *flags, "--output-dir", earlier)
    after = tree(earlier)
    assert {name: after[name] for name in after if not name.startswith(".checkpoint")} == before


# Evaluation and calibration


def evaluation_of(labels: list[int], said: list[int], confidences: list[float]) -> program.Evaluation:
    """An Evaluation in which digit `said` has that confidence, and the other nine share the rest."""
    probabilities = np.repeat((1 - np.array(confidences))[:, None] / 9, 10, axis=1)
    probabilities[np.arange(len(said)), said] = confidences
    return program.Evaluation(np.array(labels, np.uint8), probabilities)


def test_expected_calibration_error() -> None:
    """Two images at 0.9, one of them right, and two at 0.6, both right: (0.4 + 0.4) / 2."""
    evaluation = evaluation_of([1, 2, 3, 4], [1, 7, 3, 4], [0.9, 0.9, 0.6, 0.6])
    assert program.expected_calibration_error(evaluation) == pytest.approx(0.4)
    assert program.expected_calibration_error(evaluation_of([1, 2], [1, 2], [1.0, 1.0])) == pytest.approx(0)
    assert program.expected_calibration_error(evaluation_of([1, 2], [2, 1], [1.0, 1.0])) == pytest.approx(1)


def test_cross_entropy() -> None:
    evaluation = evaluation_of([1, 2], [1, 7], [0.5, 0.1])
    assert program.cross_entropy(evaluation) == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    assert math.isfinite(program.cross_entropy(evaluation_of([1], [2], [1.0])))


def test_confusion_matrix_and_per_digit() -> None:
    evaluation = evaluation_of([1, 1, 1, 2, 7], [1, 1, 7, 2, 2], [0.9] * 5)
    matrix = program.confusion_matrix(evaluation)
    expected = np.zeros((10, 10))
    expected[1, 1], expected[1, 7], expected[2, 2], expected[7, 2] = 2, 1, 1, 1
    assert np.array_equal(matrix, expected)
    figures = program.per_digit(matrix)
    assert [row["digit"] for row in figures] == list(range(10))
    for digit, *values in ((1, 1, 2 / 3, 0.8), (2, 0.5, 1, 2 / 3), (7, 0, 0, 0), (3, 0, 0, 0)):
        assert [figures[digit][name] for name in ("precision", "recall", "f1")] == pytest.approx(values)


def test_temperature_is_that_of_confidence() -> None:
    """Over-confident: T > 1; too modest: T < 1; honest: T = 1."""
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=5000)
    temperatures = []
    for confidence, accuracy in ((0.99, 0.8), (0.5, 0.95), (0.8, 0.8)):
        said = np.where(np.arange(5000) < 5000 * accuracy, labels, (labels + rng.integers(1, 10, 5000)) % 10)
        temperatures.append(program.fit_temperature(evaluation_of(labels, said, [confidence] * 5000)))
    assert temperatures[0] > 1.5
    assert temperatures[1] < 0.7
    assert temperatures[2] == pytest.approx(1, abs=0.05)


def test_calibration_helps_and_changes_no_prediction(arrays: Arrays) -> None:
    model, images, labels = program.build_model("cnn", 0, seed=3), arrays["x_test"], arrays["y_test"]
    before = program.Evaluation(labels, program.predict_probabilities(model, images))
    program.divide_logits(model, program.fit_temperature(before))
    after = program.Evaluation(labels, program.predict_probabilities(model, images))
    assert program.cross_entropy(after) <= program.cross_entropy(before) + 1e-6
    assert np.array_equal(after.predictions, before.predictions)
    assert not np.allclose(after.probabilities, before.probabilities)


# Results


def test_all_results_are_there(trained: Run) -> None:
    """And nothing else, hidden or not."""
    assert names(trained.folder) == TABLES | PICTURES


def test_metrics(trained: Run, tiny: Path) -> None:
    metrics = trained.metrics
    keys = """test_accuracy test_loss validation_accuracy validation_loss expected_calibration_error temperature
        confusion_matrix per_digit rejection_threshold dataset config versions timings_seconds
        training_images_per_second parameters peak_rss_mib started_at finished_at"""
    assert set(keys.split()) <= metrics.keys()
    assert metrics["dataset"]["name"] == "tiny"
    assert str(tiny) == metrics["dataset"]["origin"]
    assert re.fullmatch("[0-9a-f]{64}", metrics["dataset"]["sha256"])
    assert {1200, 300} <= set(metrics["dataset"].values())
    assert {"tensorflow", "keras", "numpy", "python"} <= metrics["versions"].keys()
    flags = {flag[2:].removeprefix("no-").replace("-", "_") for flag in flags_of_help()} - {"help", "version"}
    assert flags <= metrics["config"].keys()
    assert metrics["config"]["seed"] == 7
    seconds = metrics["timings_seconds"]
    total = seconds["total"]
    assert sum(seconds.values()) - total == pytest.approx(total, abs=0.5 + 0.2 * total)
    started, finished = (datetime.datetime.fromisoformat(metrics[f"{what}_at"]) for what in ("started", "finished"))
    assert started.utcoffset() == finished.utcoffset() == datetime.timedelta(0)
    assert 0 <= (finished - started).total_seconds() <= total + 2
    assert 50 < metrics["training_images_per_second"] < 1e6
    assert 100 < metrics["peak_rss_mib"] < 4000
    assert 0.05 < metrics["temperature"] < 20
    assert 0 <= metrics["validation_accuracy"] <= 1
    assert 0 < metrics["rejection_threshold"] < 100


def test_checksum_does_not_depend_on_the_format(trained: Run, arrays: Arrays, tmp_path: Path) -> None:
    digits = program.load_digits(str(write_idx(tmp_path, arrays, zipped=True)))
    assert program.dataset_metrics(digits)["sha256"] == trained.metrics["dataset"]["sha256"]


def test_metrics_agree_with_predictions(trained: Run, arrays: Arrays) -> None:
    table = read_table(trained.folder / "predictions.csv")
    assert list(table) == ["index", "label", "prediction", "confidence"]
    assert np.array_equal(table["index"], np.arange(300))
    assert np.array_equal(table["label"], arrays["y_test"])
    matrix = np.zeros((10, 10))
    np.add.at(matrix, (table["label"].astype(int), table["prediction"].astype(int)), 1)
    assert np.array_equal(matrix, trained.metrics["confusion_matrix"])
    assert trained.metrics["test_accuracy"] == pytest.approx(matrix.trace() / 300)
    assert trained.metrics["per_digit"] == program.per_digit(matrix.astype(int))
    assert trained.metrics["test_accuracy"] > 0.7


def test_model_opens_in_plain_keras(trained: Run, arrays: Arrays, tmp_path: Path) -> None:
    """Without this program, in safe mode; and it says what the tables say."""
    np.save(tmp_path / "images.npy", arrays["x_test"][..., None].astype(np.float32) / 255)
    code = """import sys, keras, numpy
model = keras.models.load_model(sys.argv[1])
numpy.save("probabilities.npy", model.predict(numpy.load("images.npy"), verbose=0))
print(model.input_shape, model.output_shape, "mnist_digit_recognizer" in sys.modules)"""
    command = [sys.executable, "-c", code, str(trained.folder / "model.keras")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(None, 28, 28, 1) (None, 10) False"
    probabilities = np.load(tmp_path / "probabilities.npy").astype(float)
    table = read_table(trained.folder / "predictions.csv")
    assert probabilities.dtype == float
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(probabilities.argmax(axis=1), table["prediction"])
    assert np.allclose(probabilities.max(axis=1), table["confidence"], atol=1e-5)
    evaluation = program.Evaluation(arrays["y_test"], probabilities)
    assert trained.metrics["test_loss"] == pytest.approx(program.cross_entropy(evaluation), rel=1e-4)
    ece = program.expected_calibration_error(evaluation)
    assert trained.metrics["expected_calibration_error"] == pytest.approx(ece, abs=1e-3)


def test_history(trained: Run) -> None:
    history = read_table(trained.folder / "history.csv")
    names = {"epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds"}
    assert names <= history.keys()
    assert np.array_equal(history["epoch"], [1, 2, 3])
    assert history["loss"][-1] < history["loss"][0]
    assert ((history["val_accuracy"] >= 0) & (history["val_accuracy"] <= 1)).all()
    # Not equal: `validation_accuracy` is that of the saved model, with test-time augmentation. On 120 images the two
    # differ by a few.
    assert history["val_accuracy"][-1] == pytest.approx(trained.metrics["validation_accuracy"], abs=0.1)


def assert_picture(path: Path) -> None:
    """It opens, is wide enough to look at, and is not blank."""
    from matplotlib.image import imread

    image = imread(path)
    assert image.shape[1] >= 600
    assert len(np.unique(image[..., :3])) > 50


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_pictures(name: str, trained: Run) -> None:
    assert_picture(trained.folder / name)


@pytest.mark.parametrize("right", [True, False])
def test_pictures_of_extremes(right: bool, arrays: Arrays, tmp_path: Path) -> None:
    """A network that is always right, or always wrong, and sure of it."""
    labels, images = arrays["y_test"], arrays["x_test"]
    evaluation = program.Evaluation(labels, np.eye(10)[labels if right else (labels + 1) % 10])
    program.plot_confusion_matrix(tmp_path / "1.png", program.confusion_matrix(evaluation), "extreme")
    program.plot_predictions(tmp_path / "2.png", images, evaluation, "extreme")
    program.plot_misclassified(tmp_path / "3.png", images, evaluation, "extreme")
    program.plot_calibration(tmp_path / "4.png", evaluation, "extreme")
    for path in tmp_path.iterdir():
        assert_picture(path)


def assert_checksums(folder: Path) -> None:
    """metrics.json lists each other result with its SHA-256; runs.csv grows from run to run."""
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names(folder)}
    assert read_metrics(folder)["files"] == {k: v for k, v in found.items() if k not in ("metrics.json", "runs.csv")}


def test_checksums(trained: Run) -> None:
    assert_checksums(trained.folder)


def test_log(trained: Run) -> None:
    """Not on a terminal: plain lines, one an epoch, and the last says it all."""
    assert not re.search(r"[\r\x1b\b]", trained.stdout)
    assert [len(re.findall(rf"\b{epoch}/3\b", trained.stdout)) for epoch in (1, 2, 3)] == [1, 1, 1]
    assert f"{100 * trained.metrics['test_accuracy']:.2f}%" in trained.stdout.splitlines()[-1]
    assert str(trained.folder) in trained.stdout
    assert trained.stderr == ""


# Measuring a saved model


def test_evaluate_reproduces_the_run(trained: Run, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    model, out = trained.folder / "model.keras", tmp_path / "out"
    code, _, err = call(capsys, "--evaluate", "--model-file", model, "--data", tiny, "--output-dir", out)
    assert (code, err) == (0, "")
    metrics = read_metrics(out)
    for key in ("test_accuracy", "confusion_matrix", "per_digit", "temperature", "rejection_threshold", "parameters"):
        assert metrics[key] == trained.metrics[key]
    assert metrics["test_loss"] == pytest.approx(trained.metrics["test_loss"])
    assert names(out) == EVALUATION_PICTURES | {"metrics.json", "predictions.csv", "runs.csv"}
    assert (out / "predictions.csv").read_bytes() == (trained.folder / "predictions.csv").read_bytes()


def test_evaluate_in_place(trained: Run, earlier: Path, tiny: Path, capsys: Capture) -> None:
    """The rest of the run's results stays, and still fits together; twice is as once."""
    for _ in range(2):
        code, out, err = call(capsys, "--evaluate", "--data", tiny, "--output-dir", earlier, "--quiet")
        assert (code, err) == (0, "")
        assert only_line(out) == trained.stdout.splitlines()[-1]
        assert names(earlier) == TABLES | PICTURES
        assert (earlier / "model.keras").read_bytes() == (trained.folder / "model.keras").read_bytes()
        assert_checksums(earlier)
        for key in ("test_accuracy", "validation_loss", "temperature", "rejection_threshold"):
            assert read_metrics(earlier)[key] == trained.metrics[key]


def strange_model(path: Path, kind: str) -> None:
    import keras
    from keras import layers

    head = [layers.Flatten(), layers.Dense(10, activation="softmax")]
    stacks = {
        "other input": [keras.Input((32, 32, 1)), *head],
        "colour": [keras.Input((28, 28, 3)), *head],
        "other output": [keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(11, activation="softmax")],
        "code": [keras.Input((28, 28, 1)), *head, layers.Lambda(lambda x: x)],
        "code inside": [keras.Input((28, 28, 1)), keras.Sequential([layers.Lambda(lambda x: x)]), *head],
    }
    keras.Sequential(stacks[kind]).save(path)


def rewrite_config(good: Path, path: Path, change: Callable[[str], str]) -> None:
    """The same model file, with another description of the network."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, change(content.decode()) if name == "config.json" else content)


@pytest.mark.parametrize(
    "metrics",
    ["", "{", "[1, 2]", '{"dataset": "mnist", "files": ["a"]}', '{"dataset": null, "files": null, "training": 3}'],
)
def test_metrics_of_another_program(metrics: str, trained: Run, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    """A metrics.json that no run of this program wrote is replaced."""
    (tmp_path / "metrics.json").write_text(metrics)
    flags = "--model-file", trained.folder / "model.keras", "--data", tiny, "--output-dir", tmp_path, "--no-plots"
    assert call(capsys, "--evaluate", *flags)[0] == 0
    assert read_metrics(tmp_path)["test_accuracy"] == trained.metrics["test_accuracy"]


def test_only_results_are_replaced(train: Train, tmp_path: Path) -> None:
    """Pictures of an earlier run go, so that none stands beside figures of another; what is the user's own stays."""
    out = train(plots=True).folder
    metrics = read_metrics(out)
    (tmp_path / "outside.txt").write_text("keep me")
    (out / "notes.txt").write_text("keep me")
    metrics["files"] |= {"../outside.txt": "", "notes.txt": "", str(tmp_path / "outside.txt"): ""}
    (out / "metrics.json").write_text(json.dumps(metrics))
    train()
    assert names(out) == TABLES | {"notes.txt"}
    assert (tmp_path / "outside.txt").exists()
    assert len((out / "runs.csv").read_text().splitlines()) == 3


STRANGE_FILES: dict[str, Callable[[Path, Path], object]] = {
    "text": lambda good, path: path.write_text("no model\n"),
    "empty": lambda good, path: path.write_bytes(b""),
    "cut": lambda good, path: path.write_bytes(good.read_bytes()[: good.stat().st_size // 2]),
    "damaged": lambda good, path: path.write_bytes(flip_bytes(good.read_bytes(), 0.5)),
    "missing": lambda good, path: None,
    "folder": lambda good, path: path.mkdir(),
    "other archive": lambda good, path: zipfile.ZipFile(path, "w").close(),
    "no JSON": lambda good, path: rewrite_config(good, path, lambda text: text[:-5]),
    "other layer": lambda good, path: rewrite_config(good, path, lambda text: text.replace('"ReLU"', '"NoSuch"')),
    "other module": lambda good, path: rewrite_config(good, path, lambda text: text.replace("keras.layers", "os")),
    "other kernel": lambda good, path: rewrite_config(good, path, lambda text: text.replace("[5, 5]", "[7, 7]")),
} | {
    kind: lambda good, path, kind=kind: strange_model(path, kind)
    for kind in ("other input", "colour", "other output", "code", "code inside")
}


@pytest.mark.parametrize("kind", STRANGE_FILES)
def test_model_files_that_are_refused(kind: str, trained: Run, earlier: Path, tiny: Path, capsys: Capture) -> None:
    path = earlier.with_name("strange.keras")
    STRANGE_FILES[kind](trained.folder / "model.keras", path)
    before = tree(earlier)
    assert "strange.keras" in refused(
        capsys, "--evaluate", "--model-file", path, "--data", tiny, "--output-dir", earlier
    )
    assert tree(earlier) == before


@pytest.mark.parametrize(("minimum", "code"), [(1.0, 3), (0.0, 0)])
def test_min_accuracy(minimum: float, code: int, train: Train, capsys: Capture) -> None:
    """Everything is written all the same."""
    run = train("--min-accuracy", minimum, code=code)
    assert run.metrics["test_accuracy"] < 1
    assert names(run.folder) == TABLES
    data = "--data", run.metrics["config"]["data"]
    evaluate = "--evaluate", *data, "--output-dir", run.folder, "--min-accuracy", minimum, "--quiet"
    result, out, err = call(capsys, *evaluate)
    assert (result, err) == (code, "")
    assert only_line(out) == run.stdout.splitlines()[-1]


# The project's other files


def test_requirements_are_those_of_the_script() -> None:
    block = re.search(r"^# /// script$(.*?)^# ///$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert re.findall(r'^#     "(.*)",$', block[1], re.MULTILINE) == [line for line in lines if line]


def test_readme_lists_the_flags() -> None:
    rows = re.findall(r"^\| `--.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed = {flag for row in rows for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", row)}
    assert listed | {"--help"} == set(flags_of_help())


# Synthetic digits


def test_synthetic_digits(arrays: Arrays) -> None:
    images, labels = np.concatenate([arrays["x_train"], arrays["x_test"]]), np.r_[arrays["y_train"], arrays["y_test"]]
    assert (images.shape, images.dtype) == ((1500, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((1500,), np.uint8)
    assert np.array_equal(np.bincount(labels), [150] * 10)
    assert len(np.unique(images, axis=0)) == 1500
    assert (images.max((1, 2)) > 150).all()


def test_synthetic_digits_are_framed_as_mnist_is(arrays: Arrays) -> None:
    """In a box of about 20 x 20 pixels, the centre of mass in the middle."""
    images = arrays["x_train"]
    for axis in (1, 2):
        inked = (images > 100).any(axis)
        extent = 28 - inked.argmax(1) - inked[:, ::-1].argmax(1)
        assert extent.max() <= 22
    distance = np.abs(centres(images) - 14)
    assert np.quantile(distance, 0.95) < 1
    assert distance.max() < 2
    assert np.abs(centres(images).mean(axis=0) - 14).max() < 0.3


def test_synthetic_digits_are_a_function_of_their_seed() -> None:
    one = program.synthetic_digits(203, seed=5)
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    assert equal_arrays(list(one), list(program.synthetic_digits(203, seed=5)))
    assert not np.array_equal(one[0], program.synthetic_digits(203, seed=6)[0])
    assert np.random.get_state()[1].tolist() == state
    assert np.ptp(np.bincount(one[1], minlength=10)) == 1


@pytest.mark.parametrize("count", [1, 10])
def test_few_synthetic_digits(count: int) -> None:
    images, labels = program.synthetic_digits(count, seed=0)
    assert (images.shape, labels.shape) == ((count, 28, 28), (count,))


@pytest.mark.slow
def test_synthetic_digits_are_fast() -> None:
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        program.synthetic_digits(60_000, seed=0)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 15


# Real MNIST


@pytest.fixture(scope="session")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What a user gets who gives no flag."""
    cwd = tmp_path_factory.mktemp("default")
    done = cli("--data", MNIST, cwd=cwd, timeout=3600)
    assert done.returncode == 0, done.stderr
    return Run(cwd / "outputs", done.stdout, done.stderr, read_metrics(cwd / "outputs"))


@needs_mnist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "accuracy"),
    [("--epochs 1", 0.992), ("--model mlp --epochs 10 --batch-size 200", 0.90)],
)
def test_accuracy_of_short_runs(flags: str, accuracy: float, tmp_path: Path) -> None:
    done = cli("--data", MNIST, *flags.split(), "--no-plots", "--min-accuracy", accuracy, cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_mnist
@pytest.mark.slow
def test_default_run(default_run: Run) -> None:
    metrics = default_run.metrics
    assert metrics["dataset"]["name"] == "mnist"
    assert metrics["test_accuracy"] >= 0.996
    assert metrics["test_loss"] <= 0.014
    assert metrics["expected_calibration_error"] <= 0.003
    assert metrics["peak_rss_mib"] <= 1536
    assert default_run.stderr == ""
    assert names(default_run.folder) == TABLES | PICTURES
    for name in PICTURES:
        assert_picture(default_run.folder / name)


def corrupted(images: np.ndarray) -> dict[str, np.ndarray]:
    """Moderate changes for the worse, of uint8 (n, 28, 28) images, by name."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    ink = images / 255
    scale = np.array([1, 1 / 0.85, 1 / 0.85])
    middle = np.array([0, 13.5, 13.5])
    changed = {
        "background": 0.3 + 0.7 * ink,
        "contrast": 0.5 * ink,
        "noise": ink + rng.normal(0, 0.15, ink.shape),
        "blur": ndimage.gaussian_filter(ink, (0, 1, 1)),
        "shade": np.maximum(ink, np.linspace(0, 0.5, 28)),
        "shift": np.roll(ink, (2, -2), axis=(1, 2)),
        "scale": ndimage.affine_transform(ink, scale, middle * (1 - scale), order=1),
    }
    return {name: (255 * values.clip(0, 1)).astype(np.uint8) for name, values in changed.items()}


@needs_mnist
@pytest.mark.slow
def test_default_model_stands_bad_light(default_run: Run) -> None:
    model, digits = program.load_model(default_run.folder / "model.keras"), program.load_digits(MNIST)
    labels = digits.test_labels[:2000]
    accuracy = {
        name: (program.predict_probabilities(model, images).argmax(axis=1) == labels).mean()
        for name, images in corrupted(digits.test_images[:2000]).items()
    }
    assert np.mean(list(accuracy.values())) >= 0.97, accuracy


# Pictures: drawing and photographing them

# strokes in a unit box, x to the right, y down
STROKES = {
    "0": [[(0.5, 0), (0.1, 0.3), (0.1, 0.7), (0.5, 1), (0.9, 0.7), (0.9, 0.3), (0.5, 0)]],
    "1": [[(0.5, 0), (0.5, 1)]],
    "4": [[(0.3, 0), (0.1, 0.55), (0.95, 0.55)], [(0.7, 0.1), (0.7, 1)]],
    "4 apart": [[(0.1, 0), (0.1, 0.5), (0.55, 0.5)], [(0.8, 0.1), (0.8, 1)]],
    "5 apart": [[(0.3, 0.12), (0.25, 0.45), (0.8, 0.5), (0.8, 0.9), (0.1, 1)], [(0.45, 0), (0.95, 0)]],
    "7": [[(0.1, 0.1), (0.9, 0.05), (0.4, 1)]],
    "i": [[(0.5, 0.35), (0.5, 1)], [(0.5, 0.0), (0.5, 0.06)]],
    "=": [[(0, 0.3), (1, 0.3)], [(0, 0.7), (1, 0.7)]],
}


def drawing(
    name: str,
    shape: tuple[int, int] = (300, 400),
    size: int = 200,
    pen: float = 16,
    corner: tuple[int, int] | None = None,
    angle: float = 0,
) -> np.ndarray:
    """Draw strokes: float (height, width), 1 where there is ink; anti-aliased."""
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
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255


def light(shape: tuple[int, int], rng: np.random.Generator, depth: float = 0.4) -> np.ndarray:
    """Uneven light: float (height, width), a slope and soft blobs, between 1 - depth and 1."""
    height, width = shape
    blobs = Image.fromarray(rng.random((3, 3)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    slope = np.linspace(0, 1, width)[None] * rng.uniform(0.3, 1) + np.linspace(0, 1, height)[:, None]
    return 1 - depth * (0.6 * slope / slope.max() + 0.4 * np.clip(blobs, 0, 1))


def photograph(
    ink: np.ndarray,
    rng: np.random.Generator,
    paper: tuple[float, ...] = (0.9, 0.88, 0.8),
    pen: tuple[float, ...] = (0.1, 0.12, 0.4),
    depth: float = 0.4,
    noise: float = 0.01,
    shade: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Photograph ink on paper: uint8 (height, width, 3). ink: float (height, width); shade: a factor on the light."""
    colours = np.array(paper) * (1 - ink[..., None]) + np.array(pen) * ink[..., None]
    lit = ndimage.gaussian_filter(colours * (light(ink.shape, rng, depth) * shade)[..., None], (0.7, 0.7, 0))
    return (255 * np.clip(lit + rng.normal(0, noise, lit.shape), 0, 1)).astype(np.uint8)


def saved(folder: Path, levels: np.ndarray | Image.Image, ending: str = "jpg", **options: Any) -> np.ndarray:
    """Save uint8 levels, or a Pillow image, and read it back as the program would: float32 (height, width)."""
    path = folder / f"picture.{ending}"
    (levels if isinstance(levels, Image.Image) else Image.fromarray(levels)).save(path, **options)
    return program.read_picture(path)


def box_of(digit: np.ndarray, above: float = 60) -> tuple[int, int, int, int]:
    """The rows and columns that ink spans: (top, bottom, left, right), ends included."""
    rows, columns = np.flatnonzero((digit > above).any(1)), np.flatnonzero((digit > above).any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two digits, slightly blurred, where shifted by a pixel they fit best: at most 1."""
    one, other = (ndimage.gaussian_filter(digit.astype(float), 1) for digit in (one, other))
    if not (one.any() and other.any()):
        return 0.0
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return max(np.corrcoef(np.roll(one, shift, (0, 1)).ravel(), other.ravel())[0, 1] for shift in shifts)


def clean(name: str, angle: float = 0, pen: float = 16) -> np.ndarray:
    """The digit made of a clean drawing, which every photograph of it should come close to."""
    return program.picture_to_digit((1 - drawing(name, angle=angle, pen=pen)).astype(np.float32))


# Pictures: reading


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_formats_and_modes_read_alike(tmp_path: Path, ending: str, mode: str) -> None:
    if (mode == "CMYK" and ending not in ("jpg", "tiff")) or (mode in ("1", "P") and ending in ("jpg", "webp")):
        pytest.skip("the format has no such mode")
    wanted = 1 - drawing("4")
    image = Image.fromarray((255 * wanted).astype(np.uint8)).convert("RGB").convert(mode)
    levels = saved(tmp_path, image, ending)
    assert levels.dtype == np.float32
    assert levels.shape == wanted.shape
    assert np.abs(levels - wanted).mean() < 0.02


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, ending: str) -> None:
    wanted = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    assert np.allclose(saved(tmp_path, (65535 * wanted).astype(np.uint16), ending), wanted, atol=1e-4)


@pytest.mark.parametrize("scale", [1, 255, 65535])
def test_floats_and_long_integers(tmp_path: Path, scale: int) -> None:
    wanted = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    assert np.allclose(saved(tmp_path, (scale * wanted).astype(np.float32), "tiff"), wanted, atol=1e-3)
    if scale > 1:
        assert np.allclose(saved(tmp_path, (scale * wanted).astype(np.int32), "tiff"), wanted, atol=1e-2)


def test_transparent_is_white(tmp_path: Path) -> None:
    ink = (255 * drawing("4")).astype(np.uint8)
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
    frames = [Image.new("L", (2400, 30), level) for level in (255, 0)]
    levels = saved(tmp_path, frames[0], "gif", save_all=True, append_images=frames[1:])
    assert levels.min() == 1
    assert max(levels.shape) <= program.MAX_SIDE


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_is_an_error(tmp_path: Path, ending: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{ending}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError):
        program.read_picture(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG of so many pixels that holds almost none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize("size", [(100_000, 100_000), (10_000, 10_001), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused(tmp_path: Path, size: tuple[int, int], capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match="megapixels"):
        program.read_picture(path)
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name, why in [("missing", "no such"), (".", "no file"), ("empty.png", "empty"), ("text.png", "not a picture")]:
        with pytest.raises(ValueError, match=why) as caught:
            program.read_picture(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
def test_damaged_bytes_raise_value_errors_only(tmp_path: Path, ending: str, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / f"hurt.{ending}"
    exif = Image.Exif()
    exif[0x0112] = 3
    options = {} if ending in ("bmp", "gif") else {"exif": exif}
    Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(path, **options)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(200):
            hurt = whole.copy()
            hurt[rng.integers(0, min(200, hurt.size), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(hurt.tobytes())
            try:
                levels = program.read_picture(path)
            except ValueError as error:
                assert "\n" not in str(error)
                assert str(tmp_path) not in str(error)
            else:
                assert levels.ndim == 2
                assert np.isfinite(levels).all()
                assert 0 <= levels.min() <= levels.max() <= 1
    assert not caught
    assert capfd.readouterr() == ("", "")


# Pictures: geometry


@pytest.mark.parametrize("name", list(STROKES))
@pytest.mark.parametrize("pen", [1.5, 6, 16, 32])
@pytest.mark.parametrize("sign", ["dark on light", "light on dark"])
def test_box_centre_and_stroke(name: str, pen: float, sign: str) -> None:
    ink = drawing(name, (600, 800), 300, pen, corner=(20, 430)).astype(np.float32)
    digit = program.picture_to_digit(1 - ink if sign == "dark on light" else ink)
    top, bottom, left, right = box_of(digit, 20)
    assert digit.dtype == np.uint8
    assert digit.shape == (28, 28)
    assert 18 <= max(bottom - top, right - left) + 1 <= 21
    assert np.abs(np.array(ndimage.center_of_mass(digit)) - 14).max() < 0.6
    assert digit.max() > 200
    large = ndimage.zoom(digit / 255, 8, order=1)
    assert program.stroke_width(large) / 8 > 1.7


def test_an_mnist_image_stays_as_it_is() -> None:
    ink = drawing("4", (28, 28), 17.5, 2.6, corner=(5, 5)).astype(np.float32)
    once = program.picture_to_digit(ink)
    assert np.abs(once / 255.0 - program.picture_to_digit(1 - ink) / 255.0).max() < 0.02
    assert np.abs(program.picture_to_digit(once / np.float32(255)) / 255.0 - once / 255.0).mean() < 0.015


@pytest.mark.parametrize("side", [8, 12, 16, 28, 60])
def test_small_pictures_touching_their_border(side: int) -> None:
    ink = drawing("7", (side, side), side * 0.9, side / 8).astype(np.float32)
    for levels in (ink, 1 - ink):
        assert likeness(program.picture_to_digit(levels), clean("7", pen=22)) > 0.85


@pytest.mark.parametrize("name", ["4 apart", "5 apart", "i", "="])
@pytest.mark.parametrize("pen", [3, 10, 20])
def test_parts_are_kept(name: str, pen: float) -> None:
    ink = program.find_ink((1 - drawing(name, (600, 800), 360, pen)).astype(np.float32))
    assert ndimage.label(ink > 0.3, np.ones((3, 3)))[1] == 2


@pytest.mark.parametrize("seed", range(4))
def test_specks_are_dropped(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ink = drawing("7")
    specks = np.zeros_like(ink)
    specks[rng.integers(0, 300, 20), rng.integers(0, 400, 20)] = 1
    dusty = np.maximum(ink, ndimage.grey_dilation(specks, size=(2, 2)))
    assert likeness(program.picture_to_digit((1 - dusty).astype(np.float32)), clean("7")) > 0.99


# Pictures: photographs

PENS = {"blue": (0.1, 0.15, 0.5), "black": (0.05, 0.05, 0.05), "red": (0.6, 0.1, 0.1), "pencil": (0.55, 0.55, 0.55)}
PAPERS = {"white": (0.98, 0.98, 0.97), "cream": (0.95, 0.92, 0.8), "grey": (0.72, 0.72, 0.71)}


@pytest.mark.parametrize("colour", list(PENS))
@pytest.mark.parametrize("paper", list(PAPERS))
@pytest.mark.parametrize("pen", [5, 16, 48])
def test_photographed_paper(tmp_path: Path, colour: str, paper: str, pen: float) -> None:
    rng = np.random.default_rng(pen)
    angle = rng.uniform(-15, 15)
    ink = drawing("7", (600, 800), 400, 2 * pen, angle=angle) if pen > 40 else drawing("7", pen=pen, angle=angle)
    grey = saved(tmp_path, photograph(ink, rng, PAPERS[paper], PENS[colour]), quality=int(rng.integers(50, 95)))
    assert likeness(program.picture_to_digit(grey), program.picture_to_digit(np.float32(1 - ink))) > 0.93


@pytest.mark.parametrize("name", ["0", "4", "7"])
def test_chalk_on_a_board(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(1)
    grey = saved(tmp_path, photograph(drawing(name), rng, (0.12, 0.25, 0.18), (0.9, 0.9, 0.88)))
    assert likeness(program.picture_to_digit(grey), clean(name)) > 0.95


@pytest.mark.parametrize("softness", [4, 15])
@pytest.mark.parametrize("name", ["0", "4", "7"])
def test_shadow_across_the_digit(tmp_path: Path, name: str, softness: float) -> None:
    across = np.arange(400)[None] + 0.4 * np.arange(300)[:, None] - 260
    shade = 1 - 0.35 / (1 + np.exp(-across / softness))
    grey = saved(tmp_path, photograph(drawing(name), np.random.default_rng(2), depth=0.2, shade=shade))
    assert likeness(program.picture_to_digit(grey), clean(name)) > 0.93


@pytest.mark.parametrize("edge", ["left", "right", "top", "bottom"])
def test_dark_edge_of_the_table(tmp_path: Path, edge: str) -> None:
    photo = photograph(drawing("4", size=150), np.random.default_rng(3))
    turns = {"left": 0, "top": 1, "right": 2, "bottom": 3}[edge]
    turned = np.rot90(photo, turns).copy()
    turned[:, :25] = (60, 40, 25)
    grey = saved(tmp_path, np.rot90(turned, -turns).copy())
    assert likeness(program.picture_to_digit(grey), clean("4", pen=21)) > 0.93


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("tilt", [0, 0.03])
def test_ruled_lines_are_removed(tmp_path: Path, squared: bool, tilt: float) -> None:
    rows, columns = np.indices((600, 800))
    lines = (rows - tilt * columns) % 70 < 3
    lines |= squared & ((columns + tilt * rows) % 70 < 3)
    ink = drawing("7", (600, 800), 350, 18)
    photo = photograph(np.maximum(ink, 0.45 * lines), np.random.default_rng(4), depth=0.2)
    digit = program.picture_to_digit(saved(tmp_path, photo))
    assert likeness(digit, program.picture_to_digit(np.float32(1 - ink))) > 0.93


# Pictures: no digit


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (28, 28), (200, 200), (600, 800), (5, 900)])
@pytest.mark.parametrize("level", [0, 6, 90, 200, 255])
def test_blank_pictures_have_no_ink(tmp_path: Path, shape: tuple[int, int], level: int) -> None:
    grey = saved(tmp_path, np.full((*shape, 3), (level, level // 2, level), np.uint8), quality=40)
    assert not program.find_ink(grey).any()
    assert not program.picture_to_digit(grey).any()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(200, 200), (600, 800)])
def test_blank_paper_has_no_ink(tmp_path: Path, seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    photo = photograph(np.zeros(shape), rng, noise=rng.uniform(0, 0.05))
    assert not program.picture_to_digit(saved(tmp_path, photo, quality=int(rng.integers(30, 95)))).any()


@pytest.mark.parametrize("shape", [(28, 28), (64, 64), (200, 200)])
def test_noise_is_not_denoised_into_strokes(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    for noise in (rng.random(shape), rng.normal(0.5, 0.2, shape).clip(0, 1), (rng.random(shape) < 0.5)):
        digit = program.picture_to_digit(noise.astype(np.float32))
        strokes = np.bincount(ndimage.label(digit > 100)[0].ravel())[1:]
        assert not digit.any() or len(strokes) > 4 or (digit > 60).sum() > 250


def test_speed_of_small_files(tmp_path: Path) -> None:
    for number in range(40):
        Image.fromarray((255 * drawing("4", (28, 28), 17, 2.5)).astype(np.uint8)).save(tmp_path / f"{number}.png")
    with ThreadPoolExecutor(2) as pool:
        digits = list(pool.map(lambda path: program.picture_to_digit(program.read_picture(path)), tmp_path.iterdir()))
    assert all(np.array_equal(digits[0], digit) for digit in digits)


# Pictures: recognising them through the command line


def save_pictures(folder: Path, images: np.ndarray, inverted: bool = False) -> Path:
    """A PNG for each of (n, 28, 28) uint8 images, named by its number."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(255 - image if inverted else image).save(folder / f"{number:05d}.png")
    return folder


def predictions_of(out: str) -> list[list[str]]:
    """The lines of standard output, by column."""
    rows = [line.split("\t") for line in out.splitlines()]
    assert all(len(row) == 4 for row in rows)
    return rows


def predict(capsys: Capture, run: Run, output: Path, *paths: Path, code: int = 0) -> list[list[str]]:
    """Recognise pictures with the model of a run: path, digit, confidence and verdict of each."""
    model = run.folder / "model.keras"
    result = call(capsys, "--model-file", model, "--output-dir", output, "--predict", *paths)
    assert result[0] == code, result
    return predictions_of(result[1])


def test_predict_files_and_folders(trained: Run, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    """Rows come in the order of the arguments and of the names in a folder; what cannot be read stops nothing."""
    images, labels = arrays["x_test"][:60], arrays["y_test"][:60]
    folder = save_pictures(tmp_path / "some digits", images, inverted=True)
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_text("no picture")
    Image.new("RGB", (300, 200), "white").save(tmp_path / "blank.JPG")
    out = tmp_path / "out"
    arguments = "--predict", tmp_path / "blank.JPG", folder, tmp_path / "missing.png"
    code, stdout, err = call(capsys, "--model-file", trained.folder / "model.keras", "--output-dir", out, *arguments)
    rows = predictions_of(stdout)
    assert code == 1
    expected = [tmp_path / "blank.JPG", *(folder / f"{number:05d}.png" for number in range(60))]
    expected += [folder / "broken.png", tmp_path / "missing.png"]
    assert [row[0] for row in rows] == [str(path) for path in expected]
    assert rows[0][3] == "not-a-digit"
    assert [row[1:] for row in rows[61:]] == [["", "", "unreadable"]] * 2
    assert len(err.splitlines()) == 2
    for name, line in zip(("broken.png", "missing.png"), err.splitlines(), strict=True):
        assert name in line
    right = np.mean([int(row[1]) == label for row, label in zip(rows[1:61], labels, strict=True)])
    assert right > trained.metrics["test_accuracy"] - 0.1
    assert {row[3] for row in rows[1:61]} <= {"digit", "not-a-digit"}

    with open(out / "external_predictions.csv", newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    assert list(table[0]) == ["path", "digit", "confidence", "score", "verdict", *(f"p{digit}" for digit in range(10))]
    assert [row["path"] for row in table] == [row[0] for row in rows]
    assert all(not row["digit"] and not row["score"] and not row["p0"] for row in table[61:])
    threshold = trained.metrics["rejection_threshold"]
    for row in table[1:61]:
        probabilities = np.array([float(row[f"p{digit}"]) for digit in range(10)])
        assert probabilities.sum() == pytest.approx(1, abs=1e-4)
        assert probabilities.argmax() == int(row["digit"])
        assert probabilities.max() == pytest.approx(float(row["confidence"]), abs=1e-3)
        assert (float(row["score"]) >= threshold) == (row["verdict"] == "digit")
    picture = np.asarray(Image.open(out / "external_predictions.png").convert("L"))
    assert picture.shape[1] >= 600
    assert len(np.unique(picture)) > 50
    assert names(out) == {"external_predictions.csv", "external_predictions.png"}


def test_predict_with_the_model_of_the_output_folder(earlier: Path, arrays: Arrays, capsys: Capture) -> None:
    """The training results beside it stay as they are."""
    before = tree(earlier)
    folder = save_pictures(earlier.parent / "digits", arrays["x_test"][:3])
    code, out, err = call(capsys, "--output-dir", earlier, "--no-plots", "--predict", folder / "00001.png")
    assert (code, err) == (0, "")
    assert [row[0] for row in predictions_of(out)] == [str(folder / "00001.png")]
    after = tree(earlier)
    assert after.pop("external_predictions.csv")
    assert after == before


def test_predict_says_what_is_missing(trained: Run, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    model = "--model-file", trained.folder / "model.keras"
    assert "empty" in refused(capsys, *model, "--output-dir", tmp_path / "out", "--predict", tmp_path / "empty")
    picture = save_pictures(tmp_path / "pictures", np.zeros((1, 28, 28), np.uint8))
    line = refused(
        capsys, "--model-file", tmp_path / "no.keras", "--output-dir", tmp_path / "out", "--predict", picture
    )
    assert "no.keras" in line
    assert names(tmp_path / "out") == set()


def test_predict_without_the_threshold_of_the_run(
    trained: Run, arrays: Arrays, tmp_path: Path, capsys: Capture
) -> None:
    """A model alone can be used; that its threshold is not known is said."""
    (tmp_path / "alone").mkdir()
    shutil.copy(trained.folder / "model.keras", tmp_path / "alone")
    picture = save_pictures(tmp_path / "pictures", arrays["x_test"][:1])
    code, out, err = call(
        capsys, "--model-file", tmp_path / "alone/model.keras", "--output-dir", tmp_path, "--predict", picture
    )
    assert code == 0
    assert len(predictions_of(out)) == 1
    assert "threshold" in only_line(err)


def test_strange_file_names_make_no_columns(trained: Run, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    folder = save_pictures(tmp_path / "pictures", arrays["x_test"][:1])
    try:
        strange = (folder / "00000.png").rename(folder / "a\tb\n$c$ \udcff.png")
    except (OSError, UnicodeError):
        pytest.skip("the file system has no such names")
    [row] = predict(capsys, trained, tmp_path / "out", strange)
    assert row[3] in ("digit", "not-a-digit")


def blanks_and_textures(rng: np.random.Generator) -> list[np.ndarray]:
    """Pictures without a digit, uint8 (height, width): blank, lit unevenly, noisy, striped, chequered, grainy."""
    pictures = []
    for side in (28, 64, 200, 400):
        rows, columns = np.indices((side, side))
        noise = rng.random((side, side))
        pictures += [np.full((side, side), level) for level in (0.0, 0.5, 1.0)] + [
            0.3 + 0.5 * columns / side + 0.02 * noise,
            noise,
            (noise > 0.5).astype(float),
            rng.normal(0.5, 0.15, (side, side)),
            0.5 + 0.4 * np.sin(columns * 2 * np.pi / (side / 7)),
            ((rows * 8 // side + columns * 8 // side) % 2).astype(float),
            ndimage.gaussian_filter(noise, side / 40) * 3 - 1,
        ]
    return [(255 * np.clip(picture, 0, 1)).astype(np.uint8) for picture in pictures]


LOOK_ALIKES = set("OoIliSsZzBbgqG")
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneral",
    "STIXGeneralItalic",
    "cmss10",
)


def printed_letters() -> list[np.ndarray]:
    """The letters that are not written like a digit, in typefaces that no training image was drawn from."""
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    letters = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 90)
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz":
            if letter not in LOOK_ALIKES:
                image = Image.new("L", (200, 200), 245)
                ImageDraw.Draw(image).text((60, 40), letter, fill=25, font=font)
                letters.append(np.asarray(image))
    return letters


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> float:
    """How often a positive scores above a negative."""
    return float((positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2)


def scores_of(folder: Path) -> np.ndarray:
    with open(folder / "external_predictions.csv", newline="", encoding="utf-8") as stream:
        return np.array([float(row["score"]) for row in csv.DictReader(stream)])


@pytest.mark.slow
@needs_mnist
@pytest.mark.parametrize("inverted", [False, True])
def test_mnist_as_pictures(inverted: bool, default_run: Run, tmp_path: Path, capsys: Capture) -> None:
    """Read from PNGs, the test images give the accuracy that they have; at least 300 a second."""
    with np.load(MNIST) as content:
        images, labels = content["x_test"][:3000], content["y_test"][:3000]
    folder = save_pictures(tmp_path / "mnist", images, inverted)
    predict(capsys, default_run, tmp_path / "out", folder / "00000.png")  # what starting takes is not counted
    started = time.perf_counter()
    rows = predict(capsys, default_run, tmp_path / "out", folder)
    assert len(rows) / (time.perf_counter() - started) > 300
    right = np.mean([int(row[1]) == label for row, label in zip(rows, labels, strict=True)])
    direct = read_table(default_run.folder / "predictions.csv")
    assert abs(right - np.mean(direct["label"][:3000] == direct["prediction"][:3000])) <= 0.001


@pytest.mark.slow
@needs_mnist
def test_what_is_no_digit(default_run: Run, tmp_path: Path, capsys: Capture) -> None:
    """Digits drawn and photographed by the seeded painter are accepted; blanks and textures never, letters rarely."""
    rng = np.random.default_rng(8)
    digits, expected = [], []
    for name in ("0", "1", "4", "4 apart", "5 apart", "7"):
        for pen in (3, 8, 16, 26):
            for paper in PAPERS.values():
                ink = drawing(name, pen=pen, angle=rng.uniform(-15, 15))
                digits.append(photograph(ink, rng, paper, PENS["blue" if pen > 8 else "black"]))
                expected.append(name[0])
    folders = {"digits": digits, "letters": printed_letters(), "nothing": blanks_and_textures(rng)}
    rows, scores = {}, {}
    for name, pictures in folders.items():
        (tmp_path / name).mkdir()
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{number:05d}.png")
        rows[name] = predict(capsys, default_run, tmp_path / "out", tmp_path / name)
        scores[name] = scores_of(tmp_path / "out")
    assert [row for row in rows["nothing"] if row[3] != "not-a-digit"] == []
    assert np.mean([row[1] == digit for row, digit in zip(rows["digits"], expected, strict=True)]) >= 0.97
    assert np.mean([row[3] == "digit" for row in rows["digits"]]) >= 0.95
    assert area_under_curve(scores["digits"], scores["letters"]) >= 0.97


# Unattended runs: helpers

posix = pytest.mark.skipif(os.name == "nt", reason="signals, fork and locks of POSIX")
LONG = "--model", "mlp", "--epochs", 60, "--batch-size", 32, "--dropout", 0.1, "--no-plots"


class Killed(BaseException):
    """Stands for SIGKILL where a run in this process is to end at a certain point."""


class Background(NamedTuple):
    """A run in the background; what it prints goes into files."""

    process: subprocess.Popen[bytes]
    log: Path
    errors: Path

    def wait_for(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not seen():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextlib.contextmanager
def background(*arguments: object, cwd: Path) -> Iterator[Background]:
    """Start the script in a process of its own, which does not outlive the block."""
    log, errors = cwd / "log.txt", cwd / "errors.txt"
    with open(log, "wb") as out, open(errors, "wb") as err:
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    try:
        yield Background(process, log, errors)
    finally:
        process.kill()
        process.wait()


def shell(command: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the shell, in which "$@" is the script with these arguments; surrogates are raw bytes."""
    program_call = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = os.environ | environment
    return subprocess.run(
        ["sh", "-c", command, "sh", *map(os.fsencode, program_call)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        timeout=300,
        check=False,
    )


def published(folder: Path) -> dict[str, bytes]:
    """What a user sees of an output folder: its files, the hidden ones aside."""
    return {name: content for name, content in tree(folder).items() if not name.startswith(".")}


def is_whole(folder: Path) -> bool:
    """Whether there is a model and all files that metrics.json lists, as it lists them."""
    listed = read_metrics(folder)["files"]
    found = {name: hashlib.sha256(content).hexdigest() for name, content in published(folder).items()}
    return "model.keras" in listed and listed == {name: found.get(name) for name in listed}


def identical(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit, and the same predictions."""
    return equal_arrays(*(weights(folder / "model.keras") for folder in (one, other))) and (
        (one / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()
    )


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
        raise AssertionError("the run went on")


# Unattended runs: results appear together


def fake_job(content: str, pictures: int) -> Callable[[program.Config], dict[str, Any]]:
    """What stands for run_training where only the writing matters: a model and some pictures."""

    def job(config: program.Config) -> dict[str, Any]:
        with program.results_folder(config.output_dir) as results:
            for name in ["model.keras", "history.csv", *sorted(PICTURES)[:pictures]]:
                (results / name).write_text(f"{content} {name}")
            metrics = {
                "test_accuracy": 1.0,
                "test_loss": 0.0,
                "test_errors": 0,
                "expected_calibration_error": 0.0,
                "peak_rss_mib": 0,
                "config": {"seed": 0},
                "dataset": {"name": content, "origin": "", "test_images": 1},
                "timings_seconds": {"total": 0.0},
                "finished_at": content,
                "files": program.checksums(results),
            }
            program.write_json(results / "metrics.json", metrics)
        return metrics

    return job


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
def test_death_at_any_step_of_writing_leaves_old_or_new_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Old or new, and after the next start no file of the other, whatever that run does."""

    def start(folder: Path, content: str, pictures: int) -> Callable[[], int]:
        def action() -> int:
            program.run_training = fake_job(content, pictures)
            return program.main(["--output-dir", str(folder)])

        return action

    monkeypatch.setattr(program, "run_training", None)
    start(tmp_path / "old", "old", 4)()
    start(tmp_path / "new", "new", 2)()
    ends = {name: published(tmp_path / name) for name in ("old", "new")}
    for end in ends.values():
        end.pop("runs.csv")
    seen, step = [], 0
    while True:
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / f"step{step}"))
        died = dies_at(step, start(folder, "new", 2))
        assert call(capsys, "--predict", tmp_path / "nowhere", "--output-dir", folder)[0] == 1  # the next start
        left = published(folder)
        rows = left.pop("runs.csv").decode().splitlines()
        assert rows[1].startswith("old,")
        seen.append(next((name for name, end in ends.items() if left == end), f"mixed: {sorted(left)}"))
        if not died:
            break
        step += 1
    assert step > 10
    assert seen == sorted(seen, reverse=True), list(enumerate(seen))  # at first all old, then all new
    assert set(seen) == {"old", "new"}


@pytest.mark.slow
@posix
def test_sigkill_at_any_time_leaves_old_or_new_results(
    earlier: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = published(earlier)
    flags = "--data", tiny, "--model", "mlp", "--epochs", 2, "--output-dir", earlier
    draw = random.Random(0)
    for _ in range(12):
        with background(*flags, cwd=tmp_path) as run, contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(draw.uniform(0.2, 14))
        call(capsys, "--predict", tmp_path / "nowhere", "--output-dir", earlier)
        assert is_whole(earlier)
        now = published(earlier)
        others = {"runs.csv", "external_predictions.csv", "external_predictions.png"}
        assert set(now) - others == set(read_metrics(earlier)["files"]) | {"metrics.json"}
        assert now == before or read_metrics(earlier)["config"]["model"] == "mlp"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("place", [".ready", ".staging", ".checkpoint", ".lock"])
def test_leftovers_do_not_cost_a_run(
    place: str, kind: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Where the program keeps its own, other things are cleared away or refused, but not after hours of training."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (outside / "model.keras").write_text("mine")
    if kind == "file":
        (out / place).write_text("rest")
    elif kind == "folder":
        (out / place / "folder").mkdir(parents=True)
        (out / place / "folder" / "rest").write_text("rest")
    else:
        (out / place).symlink_to(outside)
    began, train_model = [], program.train_model
    monkeypatch.setattr(program, "train_model", lambda *these: began.append(1) or train_model(*these))
    flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--no-plots", "--quiet", "--output-dir", out
    code, _, err = call(capsys, *flags)
    if code:
        assert code == 1
        assert str(out) in only_line(err)
        assert not began
    else:
        assert is_whole(out)
    assert tree(outside) == {"model.keras": b"mine"}


@posix
@pytest.mark.slow
def test_nothing_outside_is_changed_through_links(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    results = sorted(set(program.RESULTS) - {"runs.csv"})
    for name in results[::2]:
        (outside / name).write_text("mine")
    for name in results:
        (out / name).symlink_to(outside / name)  # every second one to nowhere
    before = tree(outside)
    flags = "--data", tiny, "--output-dir", out, "--quiet"
    assert call(capsys, *flags, "--model", "mlp", "--epochs", 1)[0] == 0
    assert tree(outside) == before
    assert is_whole(out)
    assert not any((out / name).is_symlink() for name in TABLES | PICTURES)
    (out / "runs.csv").unlink()
    (out / "runs.csv").symlink_to(outside / "runs.csv")
    code, _, err = call(capsys, *flags, "--evaluate")
    assert code == 1
    assert "runs.csv" in only_line(err)
    assert tree(outside) == before


@posix
def test_nothing_outside_is_changed_through_links_under_resume(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = "--data", tiny, "--output-dir", tmp_path / "out", "--quiet", "--model", "mlp", "--epochs", 2, "--no-plots"
    with killed_at(1):
        call(capsys, *flags)
    (tmp_path / "outside").write_text("mine")
    for name in ("seed0.part", "seed0.damaged"):
        (tmp_path / "out" / ".checkpoint" / name).symlink_to(tmp_path / "outside")
    call(capsys, *flags, "--resume")
    assert (tmp_path / "outside").read_text() == "mine"


# Unattended runs: one at a time, and signals


@posix
def test_a_second_run_is_refused_at_once(trained: Run, earlier: Path, tiny: Path, capsys: Capture) -> None:
    before = tree(earlier)
    flags = "--data", tiny, "--output-dir", earlier
    with program.hold_folder(earlier):
        started = time.perf_counter()
        for more in ((), ("--resume",), ("--evaluate",), ("--predict", tiny)):
            assert str(os.getpid()) in refused(capsys, *flags, *more)
        assert time.perf_counter() - started < 1
    assert tree(earlier) == before
    (earlier / ".lock").write_text("process 1 on somewhere since 1970-01-01T00:00:00+00:00")  # killed, it left this
    assert call(capsys, *flags, "--evaluate", "--no-plots")[0] == 0


STAGES = {"start": ".lock", "training": ".checkpoint/seed0.npz", "end": ".staging/predictions.csv"}


@posix
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("start", "SIGINT"),
        ("training", "SIGTERM"),
        pytest.param("end", "SIGINT", marks=pytest.mark.slow),
        *(pytest.param(stage, "SIGTERM", marks=pytest.mark.slow) for stage in ("start", "end")),
        pytest.param("training", "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_and_keeps_results(
    stage: str, name: str, earlier: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    (earlier / ".lock").unlink()
    before = published(earlier)
    flags = ["--data", tiny, *LONG[:-1], "--output-dir", earlier]
    if stage != "end":
        flags += ["--no-plots"]
    with background(*flags, cwd=tmp_path) as run:
        run.wait_for((earlier / STAGES[stage]).exists)
        time.sleep(0.3)
        if stage == "training":
            assert str(run.process.pid) in refused(capsys, *flags)
        started = time.perf_counter()
        run.process.send_signal(getattr(signal, name))
        assert run.process.wait(30) == 128 + getattr(signal, name)
        assert time.perf_counter() - started < 5
    assert name in only_line(run.errors.read_text())
    assert published(earlier) == before
    assert names(earlier) <= set(before) | {".checkpoint"}
    if stage == "training":
        code, out, err = call(capsys, *flags, "--resume")
        assert (code, err) == (0, "")
        assert 0 < out.count("\nepoch ") < 60
        assert is_whole(earlier)


@posix
def test_a_signal_among_the_imports_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(9)")
    done = cli("--data", "nowhere", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in done.stderr


@posix
def test_a_signal_that_becomes_another_error_is_still_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """C extensions that are being loaded turn whatever is raised into an ImportError."""

    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(program, "import_tensorflow", load)
    code, _, err = call(capsys, "--output-dir", tmp_path / "out")
    assert code == 143
    assert "SIGTERM" in only_line(err)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_heard_within_a_long_step(name: str, tmp_path: Path) -> None:
    """Large batches, sixteen at a time, keep TensorFlow away from Python for long."""
    images, labels = (np.concatenate([part] * 32) for part in program.synthetic_digits(2000, seed=0))
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    flags = "--data", "d.npz", "--batch-size", 3900, "--epochs", 30, "--output-dir", "out"
    with background(*flags, cwd=tmp_path) as run:
        run.wait_for((tmp_path / "out" / STAGES["training"]).exists)
        time.sleep(0.5)
        started = time.perf_counter()
        run.process.send_signal(getattr(signal, name))
        assert run.process.wait(120) == 128 + getattr(signal, name)
        assert time.perf_counter() - started < 5


@posix
@pytest.mark.parametrize("number", [2, 15])
def test_a_second_signal_ends_the_process_at_once(number: int) -> None:
    """While the first one has the run tidied up, the second one has the system's own effect."""
    before = signal.getsignal(number)
    handlers = []
    with contextlib.suppress(program.Stopped), program.stop_on_signals():
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)  # the signal ends it; a loaded machine may take a while to deliver it
        finally:
            handlers += [signal.getsignal(2), signal.getsignal(15)]
    assert handlers == [signal.SIG_DFL] * 2
    assert signal.getsignal(number) == before


@posix
def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    """A script's shell has its background jobs ignore SIGINT, so that Ctrl-C ends the foreground alone."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with program.stop_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, before)


# Unattended runs: resume

RESUMABLE = "--model", "mlp", "--augment", "fast", "--dropout", 0.2, "--patience", 3, "--epochs", 4, "--batch-size", 32


@pytest.fixture(scope="module")
def stopped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders: `out`, of a run stopped after its second epoch, and `whole`, of the same run left alone."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = [str(flag) for flag in ("--data", tiny, *RESUMABLE, "--no-plots", "--quiet", "--output-dir")]
    with killed_at(2):
        program.main([*flags, str(folder / "out")])
    assert program.main([*flags, str(folder / "whole")]) == 0
    return folder


@pytest.fixture
def again(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped / "out", tmp_path / "out"))


def test_resume_ends_as_if_it_had_not_been_stopped(stopped: Path, again: Path, train: Train) -> None:
    run = train(*RESUMABLE, "--resume")
    assert run.stderr == ""
    assert identical(run.folder, stopped / "whole")
    assert len(read_table(run.folder / "history.csv")["epoch"]) == 4
    assert names(run.folder) == TABLES
    seconds = read_table(run.folder / "history.csv")["seconds"].sum()
    assert run.metrics["training_images_per_second"] <= 1.1 * 4 * 1188 / seconds  # of all epochs in the time of all


@posix
@pytest.mark.parametrize("patience", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_resume_after_sigkill(patience: int, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = "--data", tiny, "--epochs", 3, "--batch-size", 64, "--dropout", 0.2, "--patience", patience, "--no-plots"
    with background(*flags, "--output-dir", "out", cwd=tmp_path) as run:
        run.wait_for((tmp_path / "out" / STAGES["training"]).exists)
    assert run.process.returncode == -signal.SIGKILL
    assert call(capsys, *flags, "--resume", "--output-dir", tmp_path / "out")[0] == 0
    assert call(capsys, *flags, "--output-dir", tmp_path / "whole")[0] == 0
    assert identical(tmp_path / "out", tmp_path / "whole")


def test_resume_of_a_committee(train: Train, capsys: Capture) -> None:
    flags = "--members", 2, "--epochs", 3, "--seed", 4, "--dropout", 0.2
    with killed_at(1, seed=5):
        train(*flags)
    resumed = train(*flags, "--resume")
    assert resumed.stdout.count("\nepoch ") == 2
    assert identical(resumed.folder, train(*flags, name="whole").folder)
    assert read_table(resumed.folder / "history.csv")["seed"].tolist() == [4, 4, 4, 5, 5, 5]


@pytest.mark.parametrize(
    "flags",
    """--epochs 5|--batch-size 31|--seed 1|--augment none|--rotation 11|--shift 0.1|--zoom 0|--shear 0.2|--elastic 1
    --flip|--model cnn|--learning-rate 0.004|--label-smoothing 0|--dropout 0.1|--patience 0|--members 2
    --train-limit 1199|--validation-split 0.2""".replace("\n", "|").split("|"),
)
def test_resume_under_other_flags_is_refused(flags: str, again: Path, tiny: Path, capsys: Capture) -> None:
    before = tree(again)
    flag = flags.split()[0]
    line = refused(capsys, "--data", tiny, *RESUMABLE, "--output-dir", again, "--resume", *flags.split())
    assert flag in line
    assert tree(again) == before


def test_resume_on_other_data_is_refused(again: Path, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "tiny.npz", **(arrays | {"x_train": arrays["x_train"][::-1]}))
    before = tree(again)
    flags = *RESUMABLE, "--output-dir", again, "--resume", "--data", tmp_path / "tiny.npz"
    assert "--data" in refused(capsys, *flags)
    assert tree(again) == before


def test_resume_with_nothing_to_resume_runs(train: Train) -> None:
    first = train("--resume")
    assert first.stderr == ""
    model = (first.folder / "model.keras").read_bytes()
    shutil.rmtree(first.folder)
    assert train().metrics["test_accuracy"] == first.metrics["test_accuracy"]
    assert model


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with np.load(path) as archive:
        state = dict(archive)
    change(state)
    np.savez(path, **state)


DAMAGED_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "bits flipped": lambda path: path.write_bytes(flip_bytes(path.read_bytes(), 0.5)),
    "of another network": lambda path: rewritten(path, lambda state: state.update(state0=np.zeros((3, 3)))),
    "without a part": lambda path: rewritten(path, lambda state: state.pop("state1")),
    "best weights of another network": lambda path: rewritten(path, lambda state: state.update(best0=np.zeros(3))),
    "other history": lambda path: rewritten(path, lambda state: state.update(history=np.array("[1, 2]"))),
    "run.json cut": lambda path: (path.parent / "run.json").write_text('{"seed":'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=[] if name in ("cut", "bits flipped", "of another network") else pytest.mark.slow)
        for name in DAMAGED_CHECKPOINTS
    ],
)
def test_damaged_checkpoint_costs_its_epochs_only(damage: str, stopped: Path, again: Path, train: Train) -> None:
    DAMAGED_CHECKPOINTS[damage](again / STAGES["training"])
    run = train(*RESUMABLE, "--resume")
    assert identical(run.folder, stopped / "whole")
    if damage != "run.json cut":
        assert "WARNING" in only_line(run.stderr)


# Unattended runs: places that cannot be written to


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a full disk, writing a file beyond this size fails."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@posix
@pytest.mark.parametrize("size", [0, 100, 2000, 20_000, 45_000])
def test_writing_that_fails_keeps_results(size: int, earlier: Path, tiny: Path, capsys: Capture) -> None:
    before = published(earlier)
    flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--output-dir", earlier
    with files_no_larger_than(size):
        assert str(earlier) in refused(capsys, *flags)
    assert published(earlier) == before
    assert call(capsys, *flags, "--no-plots")[0] == 0
    assert is_whole(earlier)


@posix
@pytest.mark.slow
def test_full_disk_keeps_results(earlier: Path, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], check=False).returncode:
        pytest.skip("may not mount")
    try:
        out = shutil.copytree(earlier, disk / "out")
        before = published(out)
        flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--output-dir", out
        total = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        for free in (0, 4096, 40_960, 81_920, 122_880, 204_800, 409_600):
            (disk / "filler").write_bytes(bytes(total - free))
            assert str(out) in refused(capsys, *flags), free
            assert published(out) == before, free
            (disk / "filler").unlink()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "call_of", ["os.replace", "save_model", "save_checkpoint", "write_predictions", "plot_samples"]
)
def test_errors_of_the_disk_keep_results(
    call_of: str, earlier: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = published(earlier)
    owner = program.os if call_of.startswith("os.") else program
    with monkeypatch.context() as patch:
        patch.setattr(owner, call_of.removeprefix("os."), fail)
        assert str(earlier) in refused(capsys, "--data", tiny, "--model", "mlp", "--epochs", 1, "--output-dir", earlier)
    assert published(earlier) == before


@pytest.mark.parametrize(
    "step", ["load_digits", "train_model", "save_model", "checksums", "remove_folder", "append_run"]
)
def test_folder_that_vanishes_during_the_run(
    step: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, function, gone = tmp_path / "out", getattr(program, step), []

    def vanish(*these: Any) -> Any:
        if (step, these[0]) != ("remove_folder", out / ".staging"):  # which is there at the start already
            shutil.rmtree(out, ignore_errors=True)
            gone.append(step)
        return function(*these)

    monkeypatch.setattr(program, step, vanish)
    flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--no-plots", "--output-dir", out, "--quiet"
    code, _, err = call(capsys, *flags)
    assert gone
    assert code == 1
    assert str(out) in only_line(err)


@posix
@pytest.mark.parametrize("flags", ["--output-dir {}/out", "--data {}/data.npz", "--data {}", "--predict {}/digit.png"])
def test_places_that_may_not_be_entered(
    flags: str, trained: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Without the right to look into a folder, a run says so in one line."""
    program.import_tensorflow()
    folder = Path(tempfile.mkdtemp())
    try:
        for name, mode in {".": 0o755, "closed": 0, "open": 0o777}.items():
            (folder / name).mkdir(exist_ok=True)
            (folder / name).chmod(mode)
        shutil.copy(trained.folder / "model.keras", folder / "model.keras")
        monkeypatch.chdir(folder / "open")
        if "--predict" in flags:
            flags += " --model-file ../model.keras"
        if os.getuid() == 0:  # who may enter anything
            os.seteuid(65534)
        code, _, err = call(capsys, *flags.format(folder / "closed").split())
        assert code == 1
        line = next(line for line in err.splitlines() if line.startswith("error: "))
        assert str(folder / "closed") in line
        assert "Traceback" not in err
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(folder)


# Unattended runs: where and how they are started


@posix
@pytest.mark.parametrize(
    "redirect",
    [
        "<&- >&- 2>&-",
        "| head -1",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("<&-", ">&-", "2>&-", ">/dev/full", "2>/dev/full")),
        pytest.param("2>&1 | true", marks=pytest.mark.slow),
    ],
)
def test_closed_or_full_streams_do_not_lose_the_run(redirect: str, tiny: Path, tmp_path: Path) -> None:
    flags = "--data", tiny, "--model", "mlp", "--epochs", 2, "--no-plots", "--output-dir", "out"
    done = shell(f'{{ "$@"; echo $? >code; }} {redirect}', *flags, cwd=tmp_path)
    assert is_whole(tmp_path / "out"), done.stderr.decode()
    assert (tmp_path / "code").read_text() == "0\n"
    assert done.stderr == b""
    assert len((tmp_path / "out" / "runs.csv").read_text().splitlines()) == 2


@posix
def test_a_closed_pipe_does_not_lose_predictions(trained: Run, earlier: Path, tmp_path: Path) -> None:
    """Not even where each picture is worth a line of complaint."""
    for index in range(600):
        (tmp_path / f"{index:03}-{'n' * 200}.png").write_bytes(b"")
    done = shell('{ "$@"; echo $? >code; } 2>&1 | head -1', "--predict", ".", "--output-dir", earlier, cwd=tmp_path)
    assert b"Traceback" not in done.stdout
    assert (tmp_path / "code").read_text() == "1\n"
    assert len((earlier / "external_predictions.csv").read_text().splitlines()) == 601


@posix
@pytest.mark.parametrize(
    "home", [None, *(pytest.param(home, marks=pytest.mark.slow) for home in ("/proc", "under a file"))]
)
def test_bare_environment(home: str | None, tiny: Path, tmp_path: Path) -> None:
    """As cron and containers start it: no locale, no home that can be written to, in another folder."""
    (tmp_path / "file").write_text("")
    environment = {"under a file": f"HOME={tmp_path / 'file' / 'home'}", None: ""}.get(home, f"HOME={home}")
    flags = "--data", tiny, "--model", "mlp", "--epochs", 1, "--output-dir", tmp_path / "out"
    bare = f"env -i PATH=/usr/bin:/bin CUDA_VISIBLE_DEVICES=-1 {environment}"
    done = shell(f'cd / && exec {bare} "$@" <&-', *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert is_whole(tmp_path / "out")
    assert not re.search(rb"[\r\x1b\b]", done.stdout)


@posix
@pytest.mark.slow
def test_names_that_are_no_text(trained: Run, tiny: Path, tmp_path: Path) -> None:
    """A file name is any bytes; standard output may be ASCII."""
    name = os.fsdecode(b"\xff\xfe \xc3\xa9\n.")
    shutil.copy(tiny, tmp_path / f"{name}npz")
    (tmp_path / f"{name}png").write_bytes(b"")
    shutil.copy(trained.folder / "samples.png", tmp_path / f"1{name}png")
    for encoding in ("ascii", "utf-8"):
        flags = "--data", f"{name}npz", "--evaluate", "--output-dir", f"{name}{encoding}", "--no-plots"
        model = "--model-file", trained.folder / "model.keras"
        done = shell('exec "$@"', *flags, *model, cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b"")
        pictures = "--predict", f"1{name}png", f"{name}png", *flags[3:5]
        done = shell('exec "$@"', *pictures, *model, cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert done.returncode == 1
        assert done.stdout.count(b"\n") == 2
        assert only_line(done.stderr.decode(errors="replace"))
        done = shell('exec "$@"', "--data", f"no{name}npz", cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert done.returncode == 1
        assert only_line(done.stderr.decode(errors="replace"))


@posix
def test_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Containers may run under a number that no user has."""
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "KERAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert "MNIST" in refused(capsys, "--data", "mnist", "--output-dir", tmp_path / "out")


def test_quiet_says_one_line(train: Train) -> None:
    run = train("--quiet")
    assert run.stderr == ""
    assert only_line(run.stdout).startswith(f"{100 * run.metrics['test_accuracy']:.2f}%")


# Unattended runs: the table of runs


def test_each_finished_run_adds_a_row(train: Train, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    table, seen = tmp_path / "out" / "runs.csv", ""
    train("--seed", 1)
    shutil.copytree(tmp_path / "out", tmp_path / "first")
    more = [
        (("--min-accuracy", 1, "--model", "mlp", "--epochs", 1), 3),
        (("--evaluate",), 0),
        (("--combine", tmp_path / "first", tmp_path / "first"), 0),
    ]
    for index, (flags, code) in enumerate([((), None), *more]):
        if code is not None:
            result = call(capsys, "--data", tiny, "--output-dir", tmp_path / "out", "--no-plots", *flags)
            assert result[0] == code, result
        assert table.read_text().startswith(seen)
        seen = table.read_text()
        assert len(seen.splitlines()) == index + 2
    refused(capsys, "--data", tmp_path / "nowhere", "--output-dir", tmp_path / "out")
    assert table.read_text() == seen
    with open(table, newline="") as stream:
        assert [row["exit_code"] for row in csv.DictReader(stream)] == ["0", "3", "0", "0"]


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_rows_of_runs_that_end_together(trained: Run, tmp_path: Path) -> None:
    fstat = os.fstat

    def slow_fstat(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        time.sleep(0.02)
        return found

    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        children = []
        for seed in range(16):
            children.append(os.fork())
            if children[-1] == 0:
                os.fstat = slow_fstat
                with contextlib.suppress(BaseException):
                    program.append_run(folder, trained.metrics | {"config": {"seed": seed}}, 0)
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        with open(folder / "runs.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert sorted(row["seed"] for row in rows) == sorted(map(str, range(16)))
        assert all(row["exit_code"] == "0" for row in rows)


# Unattended runs: committees, several devices


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one` and `two` of runs with seeds 1 and 2, and `both` of a run with both as members."""
    folder = tmp_path_factory.mktemp("pair")
    for name, flags in {"one": "--seed 1", "two": "--seed 2", "both": "--seed 1 --members 2"}.items():
        flags = f"--model mlp --epochs 2 --no-plots --quiet {flags}"
        assert program.main([*flags.split(), "--data", str(tiny), "--output-dir", str(folder / name)]) == 0
    return folder


def probabilities(model: Path, images: np.ndarray) -> np.ndarray:
    import keras

    return keras.models.load_model(model, compile=False).predict(images[..., None] / np.float32(255), verbose=0)


def test_committee_is_one_plain_model(pair: Path, tiny: Path, arrays: Arrays, tmp_path: Path, capsys: Capture) -> None:
    """Trained at once or joined later, it is the same; and a committee may be a member again."""
    images, flags = arrays["x_test"], ("--data", tiny, "--no-plots", "--quiet", "--output-dir")
    both = probabilities(pair / "both" / "model.keras", images)
    assert both.shape == (300, 10)
    assert call(capsys, *flags, tmp_path / "joined", "--combine", pair / "one", pair / "two")[0] == 0
    joined = probabilities(tmp_path / "joined" / "model.keras", images)
    np.testing.assert_allclose(joined, both, atol=2e-3)  # temperatures are fitted, not computed
    one, joined_metrics = read_metrics(pair / "both"), read_metrics(tmp_path / "joined")
    assert one["confusion_matrix"] == joined_metrics["confusion_matrix"]
    assert one["parameters"] == joined_metrics["parameters"] == 2 * read_metrics(pair / "one")["parameters"]
    assert call(capsys, *flags, tmp_path / "again", "--combine", tmp_path / "joined", pair / "one")[0] == 0
    assert probabilities(tmp_path / "again" / "model.keras", images).sum(1) == pytest.approx(1, abs=1e-5)
    assert call(capsys, *flags, tmp_path / "again", "--evaluate")[0] == 0


def test_committees_that_cannot_be(
    pair: Path, earlier: Path, tiny: Path, arrays: Arrays, tmp_path: Path, capsys: Capture
) -> None:
    import keras
    from keras import layers

    before = tree(earlier)
    flags = "--data", tiny, "--output-dir", earlier, "--combine", pair / "one"
    assert call(capsys, *flags)[0] == 2
    for name in ("missing", "empty", "text", "foreign", "headless"):
        (tmp_path / name).mkdir()
    (tmp_path / "missing").rmdir()
    (tmp_path / "text" / "model.keras").write_text("no model")
    head = [keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(10, activation="softmax")]
    keras.Sequential(head).save(tmp_path / "foreign" / "model.keras")
    keras.Sequential([keras.Input((28, 28, 1)), layers.Conv2D(10, 28), layers.Reshape((10,))]).save(
        tmp_path / "headless" / "model.keras"
    )
    for name in ("missing", "empty", "text", "foreign", "headless"):
        assert name in refused(capsys, *flags, tmp_path / name), name
    np.savez(tmp_path / "other.npz", **(arrays | {"x_train": arrays["x_train"][::-1]}))
    assert "other" in refused(capsys, *flags, pair / "two", "--data", tmp_path / "other.npz")
    assert tree(earlier) == before


@pytest.mark.slow
def test_mirrored_strategy_learns_as_one_device_does(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys, tensorflow as tf; cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n"
        "import mnist_digit_recognizer as program; sys.exit(program.main(sys.argv[1:]))"
    )
    accuracy = {}
    for strategy in ("none", "mirrored", "auto"):
        flags = f"--data {tiny} --epochs 5 --batch-size 64 --no-plots --strategy {strategy} --output-dir {strategy}"
        done = subprocess.run(
            [sys.executable, "-c", code, *flags.split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        accuracy[strategy] = read_metrics(tmp_path / strategy)["test_accuracy"]
    assert accuracy["none"] > 0.6
    assert accuracy["mirrored"] == pytest.approx(accuracy["none"], abs=0.1)
    assert accuracy["auto"] == accuracy["none"]


# Hostile inputs

HOSTILE_RUNNER = """
import json, os, resource, signal, sys, tempfile, time, traceback
import mnist_digit_recognizer as program

def give_up(*_):
    raise KeyboardInterrupt

def peak():  # since the last call, in MiB
    with open("/proc/self/status") as status:
        most = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    return most // 1024

signal.signal(signal.SIGALRM, give_up)
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # so that a fault costs this process alone
commands, report = sys.argv[1:]
program.import_tensorflow()
import tensorflow
tensorflow.get_logger().setLevel("ERROR")  # of many models in one process
with open(report, "w") as answers:
    for arguments in json.load(open(commands)):
        with tempfile.TemporaryFile() as noise:
            os.dup2(noise.fileno(), 2)
            started = time.perf_counter()
            signal.alarm(25)
            peak()
            try:
                code = program.main(arguments)
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                code = None
                traceback.print_exc()
            signal.alarm(0)
            sys.stderr.flush()
            noise.seek(0)
            answer = code, noise.read().decode(errors="replace"), time.perf_counter() - started, peak()
        print(json.dumps(answer), file=answers, flush=True)
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux does")

Case = tuple[str, list[object]]  # what is wrong, and the flags that name it


def answers_of(commands: list[list[str]], folder: Path) -> Iterator[tuple[int | None, str, float, float]]:
    """Run all commands in one process: of each the exit code, standard error, seconds and MiB."""
    (folder / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-c", HOSTILE_RUNNER, str(folder / "commands.json"), str(folder / "report")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=False, timeout=1800
    )
    answers = [json.loads(line) for line in (folder / "report").read_text().splitlines()]
    yield from answers
    if len(answers) < len(commands):
        yield None, f"the process ended with {done.returncode}", 0, 0


def faults_of(cases: Sequence[Case], folder: Path) -> list[str]:
    """Run all cases; say of which the end is not as documented: code, one line, 20 s, 2 GiB."""
    more = ["--output-dir", str(folder / "results"), "--no-plots", "--quiet"]
    answers = answers_of([[*map(str, flags), *more] for _, flags in cases], folder)
    faults, before = [], 0.0
    for (what, _), (code, err, seconds, memory) in zip(cases, answers, strict=False):
        good = err == "" if code == 0 else code == 1 and err.startswith("error: ") and err.count("\n") == 1
        if not good or seconds > 20 or memory > max(2048, before + 100):  # a case need not answer for those before it
            faults.append(f"{what}: exit code {code}, {seconds:.0f} s, {memory} MiB, {err[-300:]!r}")
        before = memory
    return faults


def damaged(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One of many ways in which bytes go wrong."""
    size = len(content)
    start, end = sorted(draw.randrange(size) for _ in range(2))
    end = min(end, start + 3000)
    noise = draw.randbytes(end - start)
    ways = {
        "cut": content[:start],
        "beginning lost": content[start:],
        "bits flipped": bytes(
            byte ^ (1 << draw.randrange(8)) if draw.random() < 5 / size else byte for byte in content
        ),
        "part lost": content[:start] + content[end:],
        "part twice": content[:end] + content[start:],
        "part zero": content[:start] + bytes(end - start) + content[end:],
        "part noise": content[:start] + noise + content[end:],
        "head noise": draw.randbytes(40) + content[40:],
        "head flipped": bytes([content[0] ^ 1]) + content[1:],
        "tail noise": content[:-60] + draw.randbytes(60),
        "all noise": noise,
    }
    return draw.choice(list(ways.items()))


ZEROS = 1 << 24


def bomb(name: str, head: bytes, size: int) -> bytes:
    """A zip archive with one member: `head`, and about `size` zeros that take no room."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
    first = deflate.compress(head) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes(ZEROS)) + deflate.flush(zlib.Z_FULL_FLUSH)
    packed = first + block * (size // ZEROS) + deflate.flush()
    plain = len(head) + size // ZEROS * ZEROS
    fields = struct.pack("<5H3I2H", 20, 0, 8, 0, 33, 0, len(packed), min(plain, 2**32 - 2), len(name), 0)
    local = b"PK\x03\x04" + fields + name.encode()
    central = b"PK\x01\x02" + struct.pack("<H", 20) + fields + struct.pack("<3H2I", 0, 0, 0, 0, 0) + name.encode()
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 1, 1, len(central), len(local) + len(packed), 0)
    return local + packed + central + end


def with_members(archive: bytes, members: dict[str, bytes], path: Path) -> None:
    """Write the archive, with further members."""
    path.write_bytes(archive)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as more:
        for name, content in members.items():
            more.writestr(name, content)


def npy(array: np.ndarray) -> bytes:
    return npy_header(array.shape, array.dtype.str) + array.tobytes()


def hostile_data(arrays: Arrays, folder: Path, count: int, rest: list[object]) -> list[Case]:
    """Data sets, `count` of them damaged at random, and others made to hurt."""
    draw, rng, paths = random.Random(1), np.random.default_rng(1), []
    small = {key: array[:60] for key, array in arrays.items()}

    def add(what: str, write: Callable[[Path], object], ending: str = ".npz") -> None:
        path = folder / f"data{len(paths)}{ending}"
        write(path)
        paths.append((f"data {len(paths)}, {what}", ["--data", path, *rest]))

    def archive(arrays: dict[str, np.ndarray], pack: bool) -> bytes:
        (np.savez_compressed if pack else np.savez)(folder / "good.npz", **arrays)
        return (folder / "good.npz").read_bytes()

    for _ in range(count):
        what, content = damaged(archive(small, draw.random() < 0.5), draw)
        add(what, lambda path, content=content: path.write_bytes(content))
    for _ in range(count // 2):
        key = draw.choice(program.NPZ_KEYS)
        dtype = draw.choice(["f2", "f8", "c16", "i8", "?", "S3", "U2", "M8[s]", "V5", "u1,f4", ">i2", "O"])
        shape = draw.choice([(60, 28, 28), (60,), (), (0, 28, 28), (60, 28), (60, 28, 28, 1), (28, 28, 60), (1,) * 30])
        array = np.zeros(shape, dtype) if draw.random() < 0.8 else rng.random(shape)
        add(f"{key} {dtype} {shape}", lambda path, a=array, k=key: path.write_bytes(archive(small | {k: a}, True)))
    headers = {
        "no dict": b"()",
        "nested": b"(" * 3000,
        "nested lists": b"{'descr': " + b"[" * 90 + b"]" * 90 + b", 'fortran_order': False, 'shape': (60, 28, 28)}",
        "negative": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-60, -28, 28)}",
        "float shape": b"{'descr': '|u1', 'fortran_order': False, 'shape': (60.0, 28, 28)}",
        "call": b"{'descr': __import__('os').system('false'), 'fortran_order': False, 'shape': (60, 28, 28)}",
        "no bytes": b"",
        "zeros": bytes(60),
        "digits": b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",)}",
        "values of 1 GB": b"{'descr': '|V1000000000', 'fortran_order': False, 'shape': (60, 28, 28)}",
        "values of no size": b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000, 28, 28)}",
    }
    for what, header in headers.items():
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        content = {f"{key}.npy": npy(array) for key, array in small.items()} | {"x_train.npy": head + bytes(1000)}
        add(f"header: {what}", lambda path, content=content: with_members(b"", content, path))
    others = {f"{key}.npy": npy(array) for key, array in small.items()}
    for dtype, shape in (("|u1", (10**6, 28, 28)), ("<f8", (10**6, 28, 28)), ("|S8", (784 * 10**6,))):
        for key in ("x_train", "y_train"):
            rest_of_it = {name: content for name, content in others.items() if name != f"{key}.npy"}
            zeros = bomb(f"{key}.npy", npy_header(shape, dtype), 4 << 30)
            add(f"bomb {key} {dtype}", lambda path, z=zeros, r=rest_of_it: with_members(z, r, path))
    add("an archive in an archive", lambda path: with_members(b"", {"x_train.npz": archive(small, True)}, path))
    add("a folder", lambda path: path.mkdir())
    add("an endless file", lambda path: path.symlink_to("/dev/zero"))
    add("a pipe", os.mkfifo)
    add("a link to itself", lambda path: path.symlink_to(path))

    def idx_folder(path: Path, change: dict[str, bytes]) -> None:
        write_idx(path, small, zipped=True)
        for name, content in change.items():
            (path / name).write_bytes(content)

    zeros = gzip.compress(bytes(ZEROS), 1) * (780 * 10**6 // ZEROS)
    heads = {"images": struct.pack(">4I", 2051, 10**6, 28, 28), "labels": struct.pack(">2I", 2049, 780 * 10**6)}
    bombs = {}
    for stem in program.IDX_NAMES:
        what = stem.split("-")[1]
        bombs[f"{stem}-{'idx3' if what == 'images' else 'idx1'}-ubyte.gz"] = gzip.compress(heads[what]) + zeros
    add("IDX, all bombs", lambda path: idx_folder(path, bombs), "")
    labels = {name: content for name, content in bombs.items() if "labels" in name}
    add("IDX, labels are bombs", lambda path: idx_folder(path, labels), "")
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz"):
        head = struct.pack(">4I", 2051, 2**32 - 1, 2**32 - 1, 2**32 - 1)
        content = gzip.compress(head) if name.endswith("gz") else head
        add("IDX, huge", lambda path, n=name, c=content: idx_folder(path, {n: c}), "")
        add("IDX, pipe", lambda path, n=name: (idx_folder(path, {}), (path / n).unlink(True), os.mkfifo(path / n)), "")
    for _ in range(count // 4):
        stem = draw.choice(program.IDX_NAMES)
        name = f"{stem}-{'idx3' if 'images' in stem else 'idx1'}-ubyte"
        zipped = draw.random() < 0.5
        plain = (write_idx(folder / "good", small) / name).read_bytes()
        what, content = damaged(gzip.compress(plain, 1) if zipped else plain, draw)
        change = {f"{name}{'.gz' if zipped else ''}": content}
        add(f"IDX, {what}", lambda path, c=change: idx_folder(path, c), "")
    return paths


def hostile_models(good: Path, folder: Path, count: int, rest: list[object]) -> list[Case]:
    """Model files, `count` of them damaged at random, and others made to hurt."""
    import h5py
    import keras
    from keras import layers

    draw, cases = random.Random(2), []

    def add(what: str, write: Callable[[Path], object], flags: list[object] = rest) -> None:
        path = folder / f"model{len(cases)}.keras"
        write(path)
        cases.append((f"model {len(cases)}, {what}", ["--model-file", path, *flags]))

    with zipfile.ZipFile(good) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def pack(path: Path, **changed: bytes) -> None:
        names = {"config": "config.json", "weights": "model.weights.h5", "metadata": "metadata.json"}
        with_members(b"", parts | {names[key]: content for key, content in changed.items()}, path)

    for _ in range(count):
        what, content = damaged(good.read_bytes(), draw)
        add(what, lambda path, c=content: path.write_bytes(c))
        what, content = damaged(parts["model.weights.h5"], draw)
        add(f"weights {what}", lambda path, c=content: pack(path, weights=c))
    values = [None, -1, 0, 1, 2, 28, 4096, 4097, 10**30, 1e308, float("nan"), True, "", "relu", "x" * 10**5, [], {}]
    values += [[4096, 4096], {"class_name": "Lambda"}, {"module": "keras.layers", "class_name": "Lambda", "config": {}}]
    values += [{"module": "keras.layers", "class_name": "GRU", "config": {"units": 10}}, "../../../passwd", "float64"]
    for _ in range(2 * count):
        config = json.loads(parts["config.json"])
        node, path = config, []
        while isinstance(node, dict | list) and node and (len(path) < 4 or draw.random() < 0.8):
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            path.append(key)
            parent, node = node, node[key]
        parent[key] = draw.choice(values)
        text = json.dumps(config).encode()
        add(f"config {path} = {str(parent[key])[:60]}", lambda path, text=text: pack(path, config=text))
    texts = {
        "deep": b"[" * 10**5 + b"]" * 10**5,
        "deep objects": b'{"config":' * 10**5 + b"1" + b"}" * 10**5,
        "a list": b"[]",
        "a number": b"1" * 5000,
        "nothing": b"",
        "null": b"null",
        "no text": b"\xff\xfe\x00",
        "lambda": parts["config.json"].replace(b'"relu"', b'{"class_name": "__lambda__", "config": {"value": "4wA="}}'),
    }
    for what, text in texts.items():
        add(f"config: {what}", lambda path, text=text: pack(path, config=text))
    for name in parts:
        add(f"without {name}", lambda path, n=name: with_members(b"", {k: v for k, v in parts.items() if k != n}, path))
    add("bomb", lambda path: with_members(bomb("bomb", b"", 8 << 30), parts, path))
    add("bomb for weights", lambda path: with_members(bomb("model.weights.h5", b"", 300 << 20), {}, path))
    lies = bomb("model.weights.h5", b"", 3 << 30).replace(struct.pack("<I", 3 << 30), struct.pack("<I", 1 << 20))
    add("bomb that says it is small", lambda path: with_members(lies, {"config.json": parts["config.json"]}, path))
    add("a pipe", os.mkfifo)
    add("endless", lambda path: path.symlink_to("/dev/zero"))

    def h5(path: Path, write: Callable[[Any], object], fresh: bool = False) -> None:
        temporary = path.with_suffix(".h5")
        temporary.write_bytes(parts["model.weights.h5"])
        with h5py.File(temporary, "w" if fresh else "a") as file:
            write(file)
        pack(path, weights=temporary.read_bytes())

    def each(change: Callable[[Any, str, Any], object]) -> Callable[[Any], None]:
        def write(file: Any) -> None:
            found: list[str] = []
            file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in found:
                parent = file[name].parent
                change(parent, name.rpartition("/")[2], file[name][...])

        return write

    def anew(value: Callable[[np.ndarray], Any], **options: Any) -> Callable[[Any, str, Any], None]:
        def change(parent: Any, name: str, old: np.ndarray) -> None:
            del parent[name]
            parent.create_dataset(name, data=value(old), **options)

        return change

    def linked(link: Any) -> Callable[[Any, str, Any], None]:
        def change(parent: Any, name: str, old: np.ndarray) -> None:
            del parent[name]
            parent[name] = link

        return change

    weights = {
        "not a number": each(anew(lambda old: np.full_like(old, np.nan))),
        "infinite": each(anew(lambda old: np.full_like(old, np.inf))),
        "largest": each(anew(lambda old: np.full_like(old, 3e38))),
        "zero": each(anew(np.zeros_like)),
        "text": each(anew(lambda old: np.full(old.shape, b"x"))),
        "complex": each(anew(lambda old: old.astype(np.complex64))),
        "other shape": each(anew(lambda old: old.ravel()[:-1])),
        "linked in a circle": each(linked(h5py.SoftLink("/loop"))),
        "linked outside": each(linked(h5py.ExternalLink("/etc/passwd", "/"))),
        "huge elsewhere": lambda file: file.create_dataset("more", (10**12,), chunks=(10**6,), compression="gzip"),
        "many huge": lambda file: [file.create_dataset(str(i), (10**7,), chunks=(10**6,)) for i in range(10)],
    }
    for what, write in weights.items():
        add(f"weights: {what}", lambda path, w=write: h5(path, w))
    add("weights: none", lambda path: h5(path, lambda file: None, fresh=True))

    def softmax() -> list[Any]:
        return [layers.Flatten(), layers.Dense(10, activation="softmax")]

    def pooled() -> list[Any]:
        return [layers.GlobalMaxPooling2D(), layers.Dense(10, activation="softmax")]

    stacks = {
        "no probabilities": [layers.Flatten(), layers.Dense(10)],
        "large numbers": [layers.Flatten(), layers.Dense(10), layers.Rescaling(1e30)],
        "zeros": [layers.Flatten(), layers.Dense(10), layers.Rescaling(0.0)],
        "many channels": [layers.Conv2D(4096, 1), *pooled()],
        "large padding": [layers.ZeroPadding2D(4000), *pooled()],
        "large images": [layers.Resizing(4096, 4096), *pooled()],
        "larger images": [layers.UpSampling2D(20), layers.UpSampling2D(20), *pooled()],
        "deep": [*(layers.Conv2D(1, 1) for _ in range(60)), *softmax()],
        "random": [layers.GaussianNoise(0.5), layers.Dropout(0.5), *softmax()],
    }
    for what, stack in stacks.items():
        add(f"network: {what}", keras.Sequential([keras.Input((28, 28, 1)), *stack]).save)

    def tiny_weights(path: Path, stack: list[Any]) -> None:
        """The description of a model that may be too large to build here, with the weights of another."""
        listed = [keras.saving.serialize_keras_object(layer) for layer in [layers.InputLayer((28, 28, 1)), *stack]]
        inner = {"name": "hostile", "trainable": True, "layers": listed}
        outer = {"module": "keras", "class_name": "Sequential", "registered_name": None, "config": inner}
        pack(path, config=json.dumps(outer | {"build_config": {"input_shape": [None, 28, 28, 1]}}).encode())

    unbuilt = {
        "much wide": [layers.Flatten(), *(layers.Dense(4096) for _ in range(60)), *softmax()],
        "large kernel": [layers.ZeroPadding2D(250), layers.Conv2D(512, 512), *pooled()],
        "largest kernel": [layers.ZeroPadding2D(2100), layers.Conv2D(4096, 4096), *pooled()],
        "wide after large": [layers.Conv2D(4096, 1), layers.Flatten(), layers.Dense(4096), *softmax()],
    }
    for what, stack in unbuilt.items():
        add(f"network: {what}", lambda path, stack=stack: tiny_weights(path, stack))
    beside = {
        "a list": {"files": [[1]]},
        "nested": {"files": {"model.keras": {}}, "dataset": []},
        "no objects": {"training": 3, "dataset": 3, "files": {"model.keras": program.sha256_of_file(good)}},
        "strange threshold": {"rejection_threshold": "x", "files": {"model.keras": program.sha256_of_file(good)}},
        "no number": {"rejection_threshold": float("nan"), "files": {"model.keras": program.sha256_of_file(good)}},
    }
    for what, metrics in beside.items():
        place = folder / what
        place.mkdir()
        shutil.copy(good, place / "model.keras")
        (place / "metrics.json").write_text(json.dumps(metrics))
        cases.append((f"metrics.json: {what}", ["--model-file", place / "model.keras", *rest]))
        cases.append((f"metrics.json: {what}, --combine", ["--combine", place, good.parent, *rest[1:]]))
    return cases


def hostile_pictures(folder: Path, count: int) -> list[tuple[str, list[tuple[Path, bool]]]]:
    """Groups of pictures: what they have in common, and of each whether it must be unreadable."""
    from PIL import Image

    draw, rng = random.Random(3), np.random.default_rng(3)
    digit = np.kron(255 - program.synthetic_digits(1, seed=0)[0][0], np.ones((4, 4), np.uint8))
    groups: dict[str, list[tuple[Path, bool]]] = {}

    def add(group: str, name: str, content: bytes, unreadable: bool) -> None:
        path = folder / f"{sum(map(len, groups.values()))}-{name}"
        path.write_bytes(content)
        groups.setdefault(group, []).append((path, unreadable))

    def encoded(image: Any, kind: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    grey = Image.fromarray(digit)
    kinds = {"PNG": {}, "JPEG": {}, "BMP": {}, "GIF": {}, "WEBP": {}, "TIFF": {}}
    for kind in kinds:
        for index in range(max(1, count // 6)):
            options = {"compression": "tiff_lzw" if index % 2 else "tiff_deflate"} if kind == "TIFF" else {}
            what, content = damaged(encoded(grey, kind, **options), draw)
            add("damaged", f"{what}.{kind.lower()}", content, False)
    sides = (1, 1), (1, 2), (2, 1), (1, 3000), (3000, 1), (2, 30000), (3, 3), (8, 8), (7, 90), (65535, 1)
    for height, width in sides:
        for content in (np.zeros((height, width)), rng.integers(0, 256, (height, width)), np.eye(height, width) * 255):
            add("shapes", f"{height}x{width}.png", encoded(Image.fromarray(content.astype(np.uint8)), "PNG"), False)
    levels = {
        "nan": np.full((40, 40), np.nan),
        "inf": np.where(np.eye(40), np.inf, 0),
        "huge": np.where(np.eye(40), 1e38, -1e38),
        "tiny": np.where(np.eye(40), 1e-40, 0),
        "mixed": rng.choice([np.nan, np.inf, -np.inf, 0, 1, 255], (40, 40)),
    }
    for name, values in levels.items():
        add("shapes", f"{name}.tiff", encoded(Image.fromarray(values.astype(np.float32)), "TIFF"), False)
    add("shapes", "deep.png", encoded(Image.fromarray(digit.astype(np.uint16) * 257), "PNG"), False)
    add("shapes", "clear.png", encoded(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), "PNG"), False)
    for mode in ("1", "P", "CMYK", "YCbCr", "LAB", "HSV"):
        image = Image.new(mode, (50, 50)) if mode in ("LAB", "HSV") else grey.convert(mode)
        with contextlib.suppress(OSError):
            add("shapes", f"{mode}.tiff", encoded(image, "TIFF"), False)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    def png(width: int, height: int, content: bytes, colour: int = 0) -> bytes:
        header = struct.pack(">2I5B", width, height, 8, colour, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + content + chunk(b"IEND", b"")

    zeros = chunk(b"IDAT", zlib.compress(bytes(1000)))
    unreadable = {
        "huge.png": png(100_000, 100_000, zeros),
        "huger.png": png(2**31 - 1, 2**31 - 1, zeros),
        "flat.png": png(0, 10, zeros),
        "cut.png": png(50, 50, zeros[:20]),
        "text.png": png(50, 50, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27))) + zeros),
        "profile.png": png(50, 50, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 27))) + zeros[:20]),
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "page.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n",
        "archive.png": bomb("x.png", b"", 1 << 28),
        "empty.png": b"",
        "huge.bmp": b"BM" + struct.pack("<IHHIIiiHH6I", 100, 0, 0, 54, 40, 90000, 90000, 1, 24, *[0] * 6),
        "huge.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0" + b"\xff" * 4 + b"\0;",
        "huge.tiff": b"II*\0\x08\0\0\0\x02\0" + struct.pack("<2H2I2H2I", 256, 4, 1, 90000, 257, 4, 1, 90000) + bytes(4),
    }
    for name, content in unreadable.items():
        add("unreadable", name, content, True)
    for colour, bands in ((0, 1), (2, 3), (6, 4)):
        block = zlib.compressobj(1)
        packed = block.compress(bytes(10_000 * (1 + 9_900 * bands))) + block.flush()
        for _ in range(2):
            add("of the largest size", f"{bands}.png", png(9_900, 10_000, chunk(b"IDAT", packed), colour), False)
    floats = Image.new("F", (8_900, 8_900))
    add("of the largest size", "floats.tiff", encoded(floats, "TIFF", compression="tiff_deflate"), False)
    return list(groups.items())


@linux
@pytest.mark.parametrize(("count", "share"), [(16, 2), pytest.param(120, 1, marks=pytest.mark.slow)])
def test_hostile_data(count: int, share: int, trained: Run, arrays: Arrays, tmp_path: Path) -> None:
    rest = ["--evaluate", "--model-file", trained.folder / "model.keras"]
    faults = faults_of(hostile_data(arrays, tmp_path, count, rest)[::share], tmp_path)
    assert not faults, "\n" + "\n".join(faults)


@linux
@pytest.mark.parametrize(("count", "share"), [(4, 3), pytest.param(40, 1, marks=pytest.mark.slow)])
def test_hostile_models(count: int, share: int, trained: Run, tiny: Path, tmp_path: Path) -> None:
    cases = hostile_models(trained.folder / "model.keras", tmp_path, count, ["--evaluate", "--data", tiny])
    faults = faults_of(cases[::share], tmp_path)
    assert not faults, "\n" + "\n".join(faults)


@linux
@pytest.mark.parametrize("count", [24, pytest.param(300, marks=pytest.mark.slow)])
def test_hostile_pictures(count: int, trained: Run, tmp_path: Path) -> None:
    """A picture that cannot be read is a row of its own and a line of complaint; the others are read all the same."""
    (tmp_path / "pictures").mkdir()
    groups = hostile_pictures(tmp_path / "pictures", count)
    model = ["--model-file", str(trained.folder / "model.keras")]
    commands = [
        ["--predict", *(str(path) for path, _ in pictures), *model, "--output-dir", str(tmp_path / what)]
        for what, pictures in groups
    ]
    faults = []
    for (what, pictures), (code, err, seconds, memory) in zip(groups, answers_of(commands, tmp_path), strict=False):
        if code not in (0, 1) or "Traceback" in err:
            faults.append(f"{what}: exit code {code}: {err[-500:]}")
            continue
        with open(tmp_path / what / "external_predictions.csv", newline="", encoding="utf-8") as stream:
            verdicts = [row["verdict"] for row in csv.DictReader(stream)]
        pairs = zip(pictures, verdicts, strict=True)
        accepted = [path.name for (path, bad), verdict in pairs if bad and verdict != "unreadable"]
        lines = err.splitlines()
        noise = [line for line in lines if not line.startswith("error: ")]
        if accepted or noise or len(lines) != verdicts.count("unreadable") or code != ("unreadable" in verdicts):
            faults.append(f"{what}: exit code {code}, accepted {accepted}, noise {noise}, {len(lines)} lines")
        if seconds > 20 or memory > 2048:
            faults.append(f"{what}: {seconds:.0f} s, {memory} MiB")
    assert not faults, "\n" + "\n".join(faults)
