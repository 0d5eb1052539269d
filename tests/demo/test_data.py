"""The bundled sample of Han characters: what is in it, its licences, reading it, and the split by class."""

from __future__ import annotations

import io

import numpy as np
import pytest

from dml_kernels.demo.data import (
    SAMPLE_PATH,
    CorruptSampleError,
    HanSample,
    load_sample,
    pack_images,
    split_classes,
    split_indices,
    unpack_images,
)
from tools.build_sample import has_ink, near_copies, shared_bitmaps
from tools.font_licences import read_faces


@pytest.fixture(scope="module")
def sample() -> HanSample:
    return load_sample()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random images: no two of them correlate."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- the bundled file -------------------------------------------------------------------------------------


def test_sample_is_1000_characters_by_16_faces_under_6_megabytes(sample):
    assert sample.images.shape == (1000, 16, 32, 32)
    assert sample.images.dtype == np.uint8
    assert sample.images.min() == 0
    assert sample.images.max() == 255
    assert len(set(sample.characters.tolist())) == 1000
    assert all("\u4e00" <= character <= "\u9fff" for character in sample.characters)
    assert len(set(sample.faces)) == 16
    assert SAMPLE_PATH.stat().st_size < 6_000_000


def test_every_cell_of_the_sample_is_a_drawing_of_its_own(sample):
    for column, face in enumerate(sample.faces):
        assert has_ink(sample.images[:, column]).all(), face
        assert not shared_bitmaps(sample.images[:, column]).any(), face
    assert not near_copies(sample.images).any()


def test_licence_file_names_every_face_with_an_allowed_licence(sample):
    table = read_faces()
    assert [face.name for face in table] == sample.faces
    text = (SAMPLE_PATH.parent / "FACES.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == sample.faces
    for face, row in zip(table, rows, strict=True):
        assert row[2].startswith(face.package + " ")
        assert row[4] == face.licence
        assert row[6] in (face.licence, "none")
        assert f"- **{face.name}**: " in text
    assert {face.licence for face in table} <= {"OFL-1.1", "Apache-2.0", "public-domain"}
    assert "SIL OPEN FONT LICENSE Version 1.1" in (SAMPLE_PATH.parent / "OFL-1.1.txt").read_text()
    assert "Version 2.0, January 2004" in (SAMPLE_PATH.parent / "Apache-2.0.txt").read_text()


def test_licence_file_is_of_the_same_build_as_the_sample():
    assert f" {SAMPLE_PATH.stat().st_size:,} bytes" in (SAMPLE_PATH.parent / "FACES.md").read_text()


# --- packing and loading ----------------------------------------------------------------------------------


def test_packing_at_4_bits_rounds_to_the_nearest_of_16_levels():
    images = np.arange(256, dtype=np.uint8).reshape(8, 32)
    packed = pack_images(images, 4)
    assert packed.shape == (8, 16)
    restored = unpack_images(packed, 4)
    assert np.abs(restored.astype(int) - images).max() == 8
    assert (restored % 17 == 0).all()
    np.testing.assert_array_equal(pack_images(restored, 4), packed)


def test_packing_at_8_bits_keeps_every_value():
    images = noise(3, 32, 32)
    np.testing.assert_array_equal(unpack_images(pack_images(images, 8), 8), images)


@pytest.mark.parametrize(
    ("images", "bits", "error"),
    [
        (np.zeros((2, 32), np.float32), 4, TypeError),
        (np.zeros((2, 31), np.uint8), 4, ValueError),
        (np.zeros((2, 32), np.uint8), 2, ValueError),
    ],
)
def test_packing_refuses_what_it_cannot_pack(images, bits, error):
    with pytest.raises(error):
        pack_images(images, bits)


def test_missing_sample_names_the_build_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tools\.build_sample --out"):
        load_sample(tmp_path / "none.npz")


def saved(**changes) -> bytes:
    """A valid small sample, with fields changed or, where None, left out."""
    fields = {
        "images": noise(3, 2, 32, 16),
        "bits": np.uint8(4),
        "code_points": np.array([0x4E00, 0x4E01, 0x4E03], np.uint32),
        "faces": np.array(["a", "b"]),
    }
    fields = {name: value for name, value in (fields | changes).items() if value is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **fields)
    return buffer.getvalue()


def flipped(content: bytes, place: float) -> bytes:
    at = int(place * len(content))
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


CORRUPT = {
    "empty": b"",
    "not a zip file": b"P5 32 32 255",
    "cut short": saved()[:-100],
    "a byte flipped": flipped(saved(), 0.5),
    "a byte flipped where a block begins": flipped(saved(), 0.02),
    "a lone array": (lambda buffer: (np.save(buffer, np.zeros(3)), buffer.getvalue())[1])(io.BytesIO()),
    "no images": saved(images=None),
    "no bits": saved(bits=None),
    "bits 5": saved(images=noise(3, 2, 32, 20), bits=np.uint8(5)),
    "bits 8 for 4": saved(bits=np.uint8(8)),
    "bits a list": saved(bits=np.array([4, 4])),
    "a face too many": saved(faces=np.array(["a", "b", "c"])),
    "faces not text": saved(faces=np.array([1, 2])),
    "pickled faces": saved(faces=np.array(["a", 2], dtype=object)),
    "float images": saved(images=np.zeros((3, 2, 32, 16), np.float32)),
    "a character twice": saved(code_points=np.array([0x4E00, 0x4E00, 0x4E03], np.uint32)),
    "unsorted characters": saved(code_points=np.array([0x4E01, 0x4E00, 0x4E03], np.uint32)),
    "no such code point": saved(code_points=np.array([1, 2, 0x110000], np.uint32)),
    "a two-dimensional table": saved(code_points=np.zeros((3, 1), np.uint32)),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_sample_is_refused_with_its_path_and_a_fix(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(CorruptSampleError, match=r"broken\.npz.*rebuild it"):
        load_sample(path)


def test_small_sample_loads(tmp_path):
    path = tmp_path / "small.npz"
    path.write_bytes(saved())
    loaded = load_sample(str(path))
    assert loaded.characters.tolist() == ["一", "丁", "七"]
    assert loaded.faces == ["a", "b"]
    np.testing.assert_array_equal(loaded.images, unpack_images(noise(3, 2, 32, 16), 4))


# --- split ------------------------------------------------------------------------------------------------


def test_split_is_disjoint_complete_and_labelled_from_zero(sample):
    train, unseen = split_classes(sample)
    for part, classes in ((train, 600), (unseen, 400)):
        assert part.images.shape == (classes * 16, 32, 32)
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == part.faces.dtype == np.int64
        assert np.bincount(part.labels).tolist() == [16] * classes
        assert np.bincount(part.faces).tolist() == [classes] * 16
    seen, held_out = split_indices(1000)
    assert sorted([*seen, *held_out]) == list(range(1000))
    for part, indices in ((train, seen), (unseen, held_out)):
        np.testing.assert_array_equal(part.images, sample.images[indices[part.labels], part.faces])


def test_split_depends_on_the_seed_alone(sample):
    first, again, other = (split_classes(sample, seed=seed)[1] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != other.images).any()


@pytest.mark.parametrize("train_classes", [0, -1, 1000, 1001])
def test_split_refuses_to_leave_a_side_empty(sample, train_classes):
    with pytest.raises(ValueError, match=f"got {train_classes}"):
        split_classes(sample, train_classes)
