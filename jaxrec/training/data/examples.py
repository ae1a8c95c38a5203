"""Sequences with one label each: the digits of scikit-learn as pixels in a row, and .npz files."""

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrec.errors import UserError, nearest
from jaxrec.training.config import ExamplesConfig
from jaxrec.training.data.digits import load_digits

DIGITS, PERMUTED = "digits", "digits-permuted"
NAMES = (DIGITS, PERMUTED)
FIELDS = ("inputs", "labels", "lengths")
UNREADABLE = (
    *(OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error),
    RuntimeError,  # of a member that is encrypted, or compressed in a way that is not known
)
"""What NumPy raises of a damaged archive."""


class Examples(NamedTuple):
    """Sequences or images and their labels, in NumPy."""

    # float32 (b t inputs), of images (b x y inputs); or uint8, of which 255 is read as 1.
    inputs: np.ndarray
    labels: np.ndarray  # int32 (b)
    lengths: np.ndarray | None = None  # int32 (b), valid steps; None: all

    def rows(self, index: Any) -> "Examples":
        """Some of them."""
        lengths = None if self.lengths is None else self.lengths[index]
        return Examples(self.inputs[index], self.labels[index], lengths)


class LabelledData(NamedTuple):
    """What a classifier is trained and judged on."""

    train: Examples
    valid: Examples
    provenance: dict[str, Any]  # source, sha256, and how many there are; values that JSON can hold


def are_examples(source: str) -> bool:
    """Whether a source can be nothing but labelled sequences."""
    return source in NAMES or source.endswith(".npz")


def load_examples(config: ExamplesConfig) -> LabelledData:
    """Reads examples to learn from and examples that are held out.

    Raises:
      UserError: there is no such source, or it cannot be read, or its arrays do not fit each other.
    """
    if config.source in NAMES:
        pixels, labels = digits()
        if config.source == PERMUTED:
            pixels = permuted(pixels)
        train, valid = _split(
            Examples(resampled(pixels, config.rate)[..., None], labels), config.valid_fraction
        )
    elif config.rate != 1:
        raise UserError(
            f"The rate is {config.rate:g}, but only {' and '.join(NAMES)} can be sampled at another"
            f" one. Leave it at 1 for {config.source}."
        )
    else:
        train, valid = _read(config)
    sha256 = hashlib.sha256()
    for array in (*train, *valid):
        if array is not None:
            sha256.update(str((array.dtype, array.shape)).encode())
            sha256.update(np.ascontiguousarray(array).data)
    provenance = {
        "source": config.source,
        "sha256": sha256.hexdigest(),
        "rate": config.rate,
        "valid_fraction": config.valid_fraction,
        "examples": len(train.labels),
        "held_out": len(valid.labels),
    }
    return LabelledData(train, valid, provenance)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 images of 8 x 8 as rows of 64 numbers of zero mean, in a fixed random order; labels.

    Raises:
      UserError: scikit-learn is not installed.
    """
    images, labels = load_digits()
    pixels = images.reshape(len(images), -1)
    return (pixels - pixels.mean()) / pixels.std(), labels


def permuted(pixels: np.ndarray) -> np.ndarray:
    """The pixels (b t) in another order, the same for all images."""
    return pixels[:, np.random.default_rng(1).permutation(pixels.shape[1])]


def resampled(pixels: np.ndarray, rate: float) -> np.ndarray:
    """The signal that joins the pixels (b t) by straight lines, at `rate` samples for each."""
    at = np.arange(round(pixels.shape[1] * rate)) / rate
    index = np.arange(pixels.shape[1])
    return np.stack([np.interp(at, index, row) for row in pixels]).astype(np.float32)


def _split(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """Those to learn from, and the first ones, which are held out."""
    held_out = round(len(examples.labels) * fraction)
    if not 0 < held_out < len(examples.labels):
        raise UserError(
            f"Of {len(examples.labels)} examples {fraction:g} cannot be held out. Give more of"
            " them, or another data.valid_fraction."
        )
    return examples.rows(slice(held_out, None)), examples.rows(slice(held_out))


def _read(config: ExamplesConfig) -> tuple[Examples, Examples]:
    file = Path(config.source).expanduser()
    if not file.is_file():
        raise UserError(
            f"There are no examples {config.source!r}.{nearest(config.source, NAMES)} Give"
            f" {', '.join(NAMES)}, or an .npz file of inputs and labels."
        )
    try:
        with file.open("rb") as opened:
            archive = np.load(opened, allow_pickle=False)
            several = isinstance(archive, np.lib.npyio.NpzFile)
            arrays = {name: archive[name] for name in archive.files} if several else {}
    except UNREADABLE as error:
        raise UserError(f"Cannot read {file}: {error}.") from error
    if not several:
        raise UserError(f"{file} is one array; expected an .npz file of several.")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise UserError(f"{file}: {name} is no array of NumPy. Write it by numpy.savez.")
    known = {prefix + name for prefix in ("", "valid_") for name in FIELDS}
    for name in arrays.keys() - known:
        raise UserError(
            f"{file} has an array {name!r}.{nearest(name, known)} Expected: {', '.join(FIELDS)},"
            " and the same with valid_ before them."
        )
    examples = _examples(file, arrays.get, "")
    if arrays.keys() & {f"valid_{name}" for name in FIELDS}:
        return examples, _examples(file, arrays.get, "valid_")
    order = np.random.default_rng(0).permutation(len(examples.labels))
    return _split(examples.rows(order), config.valid_fraction)


def _examples(file: Path, array: Callable[[str], Any], prefix: str) -> Examples:
    """Arrays of a file in the dtypes of `Examples`."""
    inputs, labels, lengths = (array(prefix + name) for name in FIELDS)
    for name, found in (("inputs", inputs), ("labels", labels)):
        if found is None:
            raise UserError(f"{file} lacks the array {prefix}{name}.")
    if (
        inputs.ndim != 3
        or not len(inputs)
        or not (inputs.dtype == np.uint8 or np.issubdtype(inputs.dtype, np.floating))
    ):
        raise UserError(
            f"{file}: {prefix}inputs must be float or uint8, (b t features), got {inputs.dtype}"
            f" {inputs.shape}."
        )
    for name, found in (("labels", labels), ("lengths", lengths)):
        if found is not None and not (
            found.shape == inputs.shape[:1] and np.issubdtype(found.dtype, np.integer)
        ):
            raise UserError(
                f"{file}: {prefix}{name} must be integers, one for each of {len(inputs)} inputs,"
                f" got {found.dtype} {found.shape}."
            )
    if inputs.dtype != np.uint8:
        inputs = inputs.astype(np.float32)
    lengths = None if lengths is None else lengths.astype(np.int32)
    return Examples(inputs, labels.astype(np.int32), lengths)
