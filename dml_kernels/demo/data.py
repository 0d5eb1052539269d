"""The bundled sample of Han characters: loading, and the split into seen and unseen classes.

A class is a Unicode Han character; an image of it is its drawing in one typeface, 32 x 32 grey. Every face draws every
character of the sample. ``tools/build_sample.py`` in the repository builds it; ``data/FACES.md`` names the faces and
their licences, and says how to rebuild it.

This module needs only NumPy.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 32
SAMPLE_PATH = Path(__file__).parent / "data" / "han_sample.npz"
REBUILD = "python -m tools.build_sample"

# What NumPy and zipfile raise for damaged files; found by a trial of some thousands of them.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


class CorruptSampleError(ValueError):
    """The file is not a sample: it was cut short or edited, or another program wrote it."""


@dataclass(frozen=True, eq=False)
class HanSample:
    """C characters as drawn by F faces.

    Attributes:
        images: (C, F, 32, 32) uint8; 0 is paper and 255 is full ink.
        characters: (C,) array of str, one character each, in ascending order of code points.
        faces: F names of faces, in the order of the second axis of ``images``.
    """

    images: UInt8Array
    characters: npt.NDArray[np.str_]
    faces: list[str]


class ImageSet(NamedTuple):
    """Labelled images, class after class and, within a class, face after face.

    Attributes:
        images: (n, 32, 32) uint8.
        labels: (n,) int64, from 0 to the number of classes - 1.
        faces: (n,) int64, indices into ``HanSample.faces``.
    """

    images: UInt8Array
    labels: Int64Array
    faces: Int64Array


def pack_images(images: UInt8Array, bits: int) -> UInt8Array:
    """Quantise images to 4 or 8 bits, and pack the last axis into bytes.

    At 4 bits a value v becomes round(v / 17); the pixel on the left is in the high half of the byte.

    Args:
        images: (..., W) uint8.
        bits: 4 or 8.

    Returns:
        (..., W * bits / 8) uint8.

    Raises:
        TypeError: images that are not uint8.
        ValueError: other bits, or an odd width at 4 bits.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    if bits == 8:
        return np.array(images, dtype=np.uint8)
    if bits != 4:
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    if images.shape[-1] % 2:
        raise ValueError(f"the last axis must be even to pack at 4 bits; the shape is {images.shape}")
    levels = ((images.astype(np.uint16) + 8) // 17).astype(np.uint8)
    packed: UInt8Array = (levels[..., 0::2] << np.uint8(4)) | levels[..., 1::2]
    return packed


def unpack_images(packed: UInt8Array, bits: int) -> UInt8Array:
    """Undo ``pack_images``: uint8 in 0 ... 255, in steps of 17 at 4 bits."""
    if bits == 8:
        return np.array(packed, dtype=np.uint8)
    if bits != 4:
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    images = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    images[..., 0::2] = (packed >> 4) * 17
    images[..., 1::2] = (packed & 15) * 17
    return images


def load_sample(path: str | Path | None = None) -> HanSample:
    """Read a packed sample.

    Args:
        path: the file; None: the bundled sample.

    Raises:
        FileNotFoundError: the file does not exist; the message says how to build one.
        CorruptSampleError: the file cannot be read as a sample; the message says what is wrong with it.
    """
    path = SAMPLE_PATH if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no character sample at {path}; build one in a checkout with: {REBUILD} --out {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            packed, bits = archive["images"], int(archive["bits"])
            code_points, names = archive["code_points"], archive["faces"]
    except UNREADABLE as error:
        raise CorruptSampleError(f"{path} is not a readable sample ({error}); {_fix(path)}") from error
    problem = _find_problem(packed, bits, code_points, names)
    if problem:
        raise CorruptSampleError(f"{path} is not a valid sample: {problem}; {_fix(path)}")
    characters = np.array([chr(code_point) for code_point in code_points])
    return HanSample(unpack_images(packed, bits), characters, [str(name) for name in names])


def split_indices(num_classes: int, train_classes: int = 600, seed: int = 0) -> tuple[Int64Array, Int64Array]:
    """Divide the classes into two sets of indices, ascending: ``train_classes`` drawn at random, and the rest.

    Label i of an ``ImageSet`` from ``split_classes`` is the class ``indices[i]`` of the sample, so
    ``sample.characters[indices]`` names the labels.

    Args:
        num_classes: the number of classes.
        train_classes: the number of classes in the first set.
        seed: of the draw.

    Raises:
        ValueError: one of the sets would be empty.
    """
    if not 0 < train_classes < num_classes:
        raise ValueError(
            f"train_classes must be from 1 to {num_classes - 1} to leave both sides a class; got {train_classes}"
        )
    order = np.random.default_rng(seed).permutation(num_classes)
    return np.sort(order[:train_classes]), np.sort(order[train_classes:])


def split_classes(sample: HanSample, train_classes: int = 600, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split a sample by character into the training set, and the unseen set of all other characters.

    This is the protocol of CUB and Stanford Online Products: the training sees no class of the second set. Labels run
    from 0 in each set; ``split_indices`` says which characters they are. Arguments and errors are those of
    ``split_indices``.
    """
    train, unseen = split_indices(len(sample.characters), train_classes, seed)
    return _gather(sample, train), _gather(sample, unseen)


def hold_out(images: ImageSet, each: int = 2, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Hold out some drawings of every class, chosen at random.

    Args:
        images: the drawings.
        each: how many drawings of each class are held out.
        seed: of the choice.

    Returns:
        The drawings that are kept, and those that are held out.

    Raises:
        ValueError: a class would be left without a drawing, or ``each`` is not positive.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(images.labels), dtype=np.bool_)
    for label in np.unique(images.labels):
        rows = np.flatnonzero(images.labels == label)
        if not 0 < each < len(rows):
            raise ValueError(f"cannot hold out {each} of {len(rows)} drawings of a character: 1 to {len(rows) - 1}")
        held[generator.choice(rows, each, replace=False)] = True
    kept, taken = (ImageSet(*(values[which] for values in images)) for which in (~held, held))
    return kept, taken


def _gather(sample: HanSample, classes: Int64Array) -> ImageSet:
    count, faces = len(classes), len(sample.faces)
    images = sample.images[classes].reshape(count * faces, *sample.images.shape[2:])
    labels = np.repeat(np.arange(count, dtype=np.int64), faces)
    return ImageSet(images, labels, np.tile(np.arange(faces, dtype=np.int64), count))


def _fix(path: Path) -> str:
    return f"take the file from the repository again, or rebuild it in a checkout: {REBUILD} --out {path}"


def _find_problem(
    packed: npt.NDArray[np.generic],
    bits: int,
    code_points: npt.NDArray[np.generic],
    names: npt.NDArray[np.generic],
) -> str | None:
    """What is wrong with the fields of a sample file, or None."""
    if bits not in (4, 8):
        return f"bits is {bits}, expected 4 or 8"
    if code_points.ndim != 1 or names.ndim != 1:
        return f"code_points {code_points.shape} and faces {names.shape} must each have one dimension"
    expected = (len(code_points), len(names), IMAGE_SIZE, IMAGE_SIZE * bits // 8)
    if packed.dtype != np.uint8 or packed.shape != expected:
        return f"images are {packed.dtype} {packed.shape}, expected uint8 {expected}"
    if code_points.dtype.kind != "u" or names.dtype.kind != "U":
        return f"code_points are {code_points.dtype}, faces {names.dtype}; expected unsigned integers and text"
    if len(code_points) and int(code_points.max()) > 0x10FFFF:
        return "a code point is past U+10FFFF"
    if not (np.diff(code_points.astype(np.int64)) > 0).all():
        return "code points are not in ascending order, or one is there twice"
    return None
