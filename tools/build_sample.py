"""Builds the demo's sample of Han characters: downloads Debian font packages, renders, filters and packs drawings.

    python -m tools.build_sample --out build/han_sample.npz --work-dir build/han_fonts

Nothing is installed: packages are fetched with ``apt-get download`` and unpacked with ``dpkg-deb -x`` in the work
directory. ``font_licences.py`` reads the table of faces and checks their licences. A font may map characters that it
does not draw, so drawings are filtered:

- a blank bitmap is dropped;
- a bitmap that more than two code points of a face share is dropped (the "missing glyph" box, fillers);
- a drawing that, blurred, correlates above .95 with the drawing of the same character by an earlier face is dropped.

Only characters with a drawing left in every face are eligible; the seed chooses among them. The same seed, packages,
Pillow and FreeType give the same bytes. The program needs Debian or Ubuntu, Pillow, fontTools and tqdm.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dml_kernels.demo.data import IMAGE_SIZE, SAMPLE_PATH, Int64Array, UInt8Array, pack_images, unpack_images

from .font_licences import LICENCE_TEXTS, BuildError, Face, check_face, describe_faces, read_faces

if TYPE_CHECKING:
    from PIL import ImageFont

BoolArray = npt.NDArray[np.bool_]

FIRST_CODE_POINT, LAST_CODE_POINT = 0x4E00, 0x9FFF  # the CJK Unified Ideographs block
FONT_SIZE = 28  # pixels an em: the ink then fits 32 x 32 for all but a handful of glyphs
SHARED_LIMIT = 2  # two code points may be drawn alike (duplicate encodings); more share a filler
COPY_LIMIT = 0.95  # the correlation of blurred drawings above which they count as copies


# --- packages ---------------------------------------------------------------------------------------------


def fetch_package(package: str, work_dir: Path) -> Path:
    """Unpack a Debian package and return its root; download it first unless its .deb is in ``work_dir``."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise BuildError(f"{tool} not found: the fonts are Debian packages; run this on Debian or Ubuntu")
    archives = sorted(work_dir.glob(f"{package}_*.deb"))
    if not archives:
        _run(
            ["apt-get", "download", "-q", package],
            work_dir,
            f"cannot download {package}",
            "run `apt-get update` as root and try again; if it stays unknown, this release does not have it",
        )
        archives = sorted(work_dir.glob(f"{package}_*.deb"))
    if len(archives) != 1:
        found = ", ".join(archive.name for archive in archives) or "none"
        raise BuildError(f"expected one version of {package} in {work_dir}, found {found}; delete the others")
    root = work_dir / "unpacked" / archives[0].stem
    if not root.is_dir():
        partial = root.with_name(root.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _run(
            ["dpkg-deb", "-x", str(archives[0].resolve()), str(partial.resolve())],
            work_dir,
            f"cannot unpack {archives[0]}",
            "it may have been cut short: delete it and try again",
        )
        partial.rename(root)
    return root


def _run(command: Sequence[str], cwd: Path, what: str, fix: str) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise BuildError(f"{what} ({lines[-1]}); {fix}")


def font_path(face: Face, root: Path) -> Path:
    return root / "usr/share/fonts" / face.file


def read_font(face: Face, root: Path) -> tuple[list[tuple[int, str]], Int64Array]:
    """The records (id, text) of a font's name table, and the Han code points that it maps, ascending."""
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    with TTFont(font_path(face, root), fontNumber=face.index, lazy=True) as font:
        names = dict.fromkeys((record.nameID, record.toUnicode("replace")) for record in font["name"].names)
        codes = [code for code in font.getBestCmap() if FIRST_CODE_POINT <= code <= LAST_CODE_POINT]
    return list(names), np.array(sorted(codes), dtype=np.int64)


def verify_face(face: Face, root: Path) -> Face:
    """``check_face`` on an unpacked package."""
    notice = root / "usr/share/doc" / face.package / "copyright"
    for path in (notice, font_path(face, root)):
        if not path.is_file():
            raise BuildError(f"{root.name} has no {path.relative_to(root)}: another version of {face.package}?")
    version = root.name.split("_")[1].replace("%3a", ":")
    return check_face(face, version, notice.read_text(encoding="utf-8"), read_font(face, root)[0])


# --- rendering --------------------------------------------------------------------------------------------


def render_glyph(font: ImageFont.FreeTypeFont, character: str) -> UInt8Array:
    """The ink of a character, cropped and centred, (32, 32) uint8; all zero where the font draws nothing."""
    from PIL import Image, ImageDraw

    margin = FONT_SIZE  # ink may leave the em square on any side
    canvas = Image.new("L", (3 * FONT_SIZE, 3 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((margin, margin), character, fill=255, font=font)
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    box = canvas.getbbox()
    if box is None:
        return image
    ink = canvas.crop(box)
    ink.thumbnail((IMAGE_SIZE, IMAGE_SIZE))  # shrinks only the few that are larger
    top, left = (IMAGE_SIZE - ink.height) // 2, (IMAGE_SIZE - ink.width) // 2
    image[top : top + ink.height, left : left + ink.width] = np.asarray(ink)
    return image


def render_codes(
    path: Path,
    index: int,
    codes: Int64Array,
    bits: int,
    advance: Callable[[int], object] = lambda count: None,
) -> UInt8Array:
    """Images (n, 32, 32) of code points, as a sample that is packed at ``bits`` holds them."""
    from PIL import ImageFont

    font = ImageFont.truetype(path, FONT_SIZE, index, layout_engine=ImageFont.Layout.BASIC)
    images = np.zeros((len(codes), IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    for row, code in enumerate(codes.tolist()):
        images[row] = render_glyph(font, chr(code))
        advance(1)
    return unpack_images(pack_images(images, bits), bits)


# --- filters ----------------------------------------------------------------------------------------------


def has_ink(images: UInt8Array) -> BoolArray:
    """Which images (n, H, W) are not blank: (n,) bool."""
    return np.asarray(images.any(axis=(1, 2)))


def shared_bitmaps(images: UInt8Array, limit: int = SHARED_LIMIT) -> BoolArray:
    """Which images (n, H, W) occur more than ``limit`` times: (n,) bool."""
    keys = [image.tobytes() for image in images]
    counts = Counter(keys)
    return np.array([counts[key] > limit for key in keys], dtype=np.bool_)


def near_copies(images: UInt8Array, limit: float = COPY_LIMIT) -> BoolArray:
    """Which images (C, F, H, W) correlate, blurred, above ``limit`` with an earlier kept one of the class: (C, F) bool.

    The blur is 1-2-1 in both directions. The correlation is Pearson's over all pixels, and 0 with a constant image.
    """
    dropped = np.zeros(images.shape[:2], dtype=np.bool_)
    for row, group in enumerate(images):  # a class at a time, to save memory
        vectors = _blur(group).reshape(len(group), -1)
        vectors -= vectors.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norms > 0, norms, 1)
        alike = vectors @ vectors.T > limit
        for column in range(1, len(group)):
            dropped[row, column] = (alike[column, :column] & ~dropped[row, :column]).any()
    return dropped


def _blur(images: UInt8Array) -> npt.NDArray[np.float64]:
    wide = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    wide = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    return wide[:, :, :-2] + 2 * wide[:, :, 1:-1] + wide[:, :, 2:]


def choose_characters(
    drawings: Sequence[tuple[Int64Array, UInt8Array]], count: int, seed: int
) -> tuple[Int64Array, UInt8Array, int]:
    """Choose ``count`` of the eligible characters: those that all faces draw, no two faces nearly alike.

    Args:
        drawings: for each face, the code points that it draws, ascending, and their images.
        count: how many characters to choose.
        seed: of the choice.

    Returns:
        Code points (count,), ascending, images (count, F, 32, 32), and the number of eligible characters.

    Raises:
        BuildError: fewer characters are eligible.
    """
    common = drawings[0][0]
    for codes, _ in drawings[1:]:
        common = np.intersect1d(common, codes, assume_unique=True)
    images = np.stack([drawn[np.searchsorted(codes, common)] for codes, drawn in drawings], axis=1)
    eligible = np.flatnonzero(~near_copies(images).any(axis=1))
    if len(eligible) < count:
        raise BuildError(f"only {len(eligible)} characters are drawn by all faces; lower --characters ({count})")
    chosen = np.sort(np.random.default_rng(seed).choice(eligible, count, replace=False))
    return common[chosen], images[chosen], len(eligible)


# --- output -----------------------------------------------------------------------------------------------


def pack_sample(codes: Int64Array, images: UInt8Array, faces: Sequence[str], bits: int) -> bytes:
    """The bytes of the .npz file that ``load_sample`` reads."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=pack_images(images, bits),
        bits=np.uint8(bits),
        code_points=codes.astype(np.uint32),
        faces=np.array(faces),
    )
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file next to ``path`` and rename it: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o644)  # mkstemp makes it readable to its owner only
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def build(out: Path, work_dir: Path, characters: int = 1000, seed: int = 0, bits: int = 4) -> str:
    """Build a sample, and write FACES.md and the licence texts into the same folder.

    Args:
        out: the file of the sample.
        work_dir: the folder of the packages.
        characters: how many characters the sample has.
        seed: of the choice of characters.
        bits: grey levels, 4 or 8 bits a pixel.

    Returns:
        A summary in words.

    Raises:
        BuildError: a package cannot be fetched, a licence does not allow its use, or too few characters are left.
        ModuleNotFoundError: Pillow, fontTools or tqdm is missing.
    """
    from PIL import __version__ as pillow_version
    from PIL import features
    from tqdm import tqdm  # type: ignore[import-untyped]

    work_dir.mkdir(parents=True, exist_ok=True)
    faces = read_faces()
    packages = tqdm(list(dict.fromkeys(face.package for face in faces)), desc="packages", unit="package")
    roots = {package: fetch_package(package, work_dir) for package in packages}
    faces = tuple(verify_face(face, roots[face.package]) for face in faces)
    mapped = [read_font(face, roots[face.package])[1] for face in faces]
    drawings = []
    with tqdm(total=sum(map(len, mapped)), desc="glyphs", unit="glyph", unit_scale=True) as bar:
        for face, codes in zip(faces, mapped, strict=True):
            images = render_codes(font_path(face, roots[face.package]), face.index, codes, bits, bar.update)
            inked, shared = has_ink(images), shared_bitmaps(images)
            kept = inked & ~shared
            drawings.append((codes[kept], images[kept]))
            bar.write(
                f"{face.name:21s} {face.licence:14s} maps {len(codes):6,d}, {(~inked).sum():6,d} blank, "
                f"{(inked & shared).sum():4,d} shared, draws {kept.sum():6,d}"
            )
    chosen, images, eligible = choose_characters(drawings, characters, seed)
    content = pack_sample(chosen, images, [face.name for face in faces], bits)
    summary = (
        f"{characters:,} characters x {len(faces)} faces, {IMAGE_SIZE} x {IMAGE_SIZE} grey at {bits} bits, "
        f"{len(content):,} bytes,\nchosen by seed {seed} among the {eligible:,} that all faces draw, no two "
        f"nearly alike; rendered with Pillow {pillow_version}, FreeType {features.version('freetype2')}."
    )
    options = f"--characters {characters} --seed {seed} --bits {bits}"
    write_atomically(out, content)
    write_atomically(out.with_name("FACES.md"), describe_faces(faces, summary, options).encode())
    for name in LICENCE_TEXTS:
        write_atomically(out.with_name(name), (SAMPLE_PATH.parent / name).read_bytes())
    return summary


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.build_sample",
        description="Builds the sample of Han characters that the demo trains on: downloads Debian font "
        "packages (some 210 MB, none is installed), checks their licences, renders, filters and packs. "
        "Writes the sample, FACES.md and the licence texts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=SAMPLE_PATH, help="sample to write, a .npz file")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("build/han_fonts"),
        help="where packages are kept and unpacked; what is there is not downloaded again",
    )
    parser.add_argument("--characters", type=_positive, default=1000, help="number of characters (classes)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of characters")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="grey levels kept, in bits a pixel")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        summary = build(options.out, options.work_dir, options.characters, options.seed, options.bits)
    except ModuleNotFoundError as error:
        print(f"error: {error}; fix: pip install pillow fonttools tqdm", file=sys.stderr)
        return 1
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {summary}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
