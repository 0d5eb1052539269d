"""The script that builds the sample of Han characters: planted cases, fonts drawn here, no downloads."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dml_kernels.demo.data import load_sample
from tools import build_sample
from tools.build_sample import choose_characters, has_ink, near_copies, shared_bitmaps
from tools.font_licences import BuildError, Face, check_face, check_names, read_copyright


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random images: no two of them correlate."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- filters, on planted cases ----------------------------------------------------------------------------


def test_blank_bitmaps_are_found_and_a_single_dot_is_ink():
    images = np.zeros((3, 32, 32), np.uint8)
    images[1, 31, 31] = 17
    assert has_ink(images).tolist() == [False, True, False]


def test_a_bitmap_of_two_code_points_stays_and_of_three_goes():
    pair, tofu, own = noise(3, 32, 32)
    images = np.stack([tofu, pair, own, tofu, pair, tofu])
    assert shared_bitmaps(images).tolist() == [True, False, False, True, False, True]


def test_near_copies_go_and_the_earlier_drawing_stays():
    stroke = np.zeros((32, 32), np.uint8)
    stroke[8:24, 10:13] = 255
    fainter = stroke // 2  # the same drawing in another grey: correlation 1
    moved = np.roll(stroke, 6, axis=1)
    crossed = stroke.copy()
    crossed[15:17, 4:28] = 255
    blank = np.zeros((32, 32), np.uint8)
    images = np.stack([[stroke, moved, fainter, crossed, blank], [blank, moved, stroke, crossed, moved]])
    with np.errstate(all="raise"):  # a blank image must not divide by its norm
        assert near_copies(images).tolist() == [[False, False, True, False, False], [False] * 4 + [True]]


def test_a_drawing_like_a_dropped_one_alone_stays():
    images = np.zeros((1, 3, 32, 32), np.uint8)
    for column, shift in enumerate((0, 2, 4)):  # neighbours alike, the ends not
        images[0, column, :, 2 + shift : 22 + shift] = 255
    # Moved by d, 20 columns of ink of 32 correlate at 1 - d / 20 / (12 / 32): .73 and .47, blurred some more.
    assert near_copies(images, limit=0.65).tolist() == [[False, True, False]]


def test_choice_takes_only_what_all_faces_draw_and_no_near_copies():
    codes = np.arange(100, 110)
    first, second = noise(10, 32, 32, seed=1), noise(10, 32, 32, seed=2)
    second[4] = first[4]  # a copy: 104 must go; 100 is not drawn by the second face
    drawings = [(codes, first), (codes[1:], second[1:])]
    chosen, images, eligible = choose_characters(drawings, 8, seed=0)
    assert eligible == 8
    assert chosen.tolist() == [101, 102, 103, 105, 106, 107, 108, 109]
    np.testing.assert_array_equal(images[:, 0], first[chosen - 100])
    np.testing.assert_array_equal(images[:, 1], second[chosen - 100])
    with pytest.raises(BuildError, match="only 8 characters"):
        choose_characters(drawings, 9, seed=0)


def test_choice_is_fixed_by_the_seed():
    drawings = [(np.arange(50), noise(50, 32, 32, seed=face)) for face in range(2)]
    picks = [choose_characters(drawings, 10, seed)[0].tolist() for seed in (0, 0, 1)]
    assert picks[0] == picks[1] == sorted(set(picks[0]))
    assert picks[0] != picks[2]


# --- licences ---------------------------------------------------------------------------------------------

HEAD = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\n"
PACKAGING = "\n\nFiles: debian/*\nCopyright: 2020 A Packager\nLicense: GPL-2+\n"
ACCEPTED = {
    "plain": ("Files: *\nCopyright: 2020 A\nLicense: OFL-1.1\n text", "OFL-1.1"),
    "debian's other name": ("Files: *\nCopyright: 2020 A\nLicense: SIL-1.1", "OFL-1.1"),
    "short apache": ("Files: f.ttf\nCopyright: 2020 A\nLicense: Apache-2", "Apache-2.0"),
    "a choice": ("Files: *\nCopyright: A\nLicense: GPL-3+ with Font exception or Apache-2.0", "Apache-2.0"),
    "public domain": ("Files: *.ttf\nCopyright: A\nLicense: Public Domain", "public-domain"),
    "own paragraph wins": (
        "Files: *\nCopyright: A\nLicense: GPL-2+\n\nFiles: f.ttf\nCopyright: B\nLicense: OFL-1.1",
        "OFL-1.1",
    ),
}
REFUSED = {
    "gpl": "Files: *\nCopyright: A\nLicense: GPL-2+\n\nLicense: OFL-1.1\n text",
    "both at once": "Files: *\nCopyright: A\nLicense: Apache-2.0 and M+FONTS",
    "unknown": "Files: *\nCopyright: A\nLicense: Original",
    "empty": "Files: *\nCopyright: A\nLicense:",
    "no licence field": "Files: *\nCopyright: A",
    "only packaging": "Files: debian/*\nCopyright: A\nLicense: OFL-1.1",
    "the font apart": "Files: *\nCopyright: A\nLicense: OFL-1.1\n\nFiles: *.ttf\nLicense: GPL-2",
    "not machine-readable": "This font is free to use. OFL-1.1.",
}


@pytest.mark.parametrize(("text", "licence"), ACCEPTED.values(), ids=ACCEPTED)
def test_copyright_file_gives_the_licence_of_the_font(text, licence):
    assert read_copyright(HEAD + text + PACKAGING, "f.ttf").licence == licence


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_other_licences_are_refused(text):
    with pytest.raises(BuildError, match=r"f\.ttf"):
        read_copyright(HEAD + text + PACKAGING, "f.ttf")


def test_notices_and_reserved_names_are_kept():
    text = (
        "Files: *\nCopyright:\n 2020 One <one@example.org>\n 2021 Two\nLicense: OFL-1.1\n"
        'Comment: With Reserved Font Names "One"\n and "Two". Ask first.\n\n'
        'License: OFL-1.1\n "Reserved Font Name" refers to names\n .\n with Reserved Font Name Three\n .\n'
    )
    found = read_copyright(HEAD + text + PACKAGING, "f.ttf")
    assert found.notices == ("2020 One <one@example.org>", "2021 Two")
    assert found.reserved == ('With Reserved Font Names "One" and "Two"', "with Reserved Font Name Three")


OFL_RECORD = (13, "Licensed under the SIL Open Font License, Version 1.1.")


def test_name_table_must_not_contradict():
    assert check_names([OFL_RECORD], "F", "OFL-1.1") == "OFL-1.1"
    assert check_names([(4, "GPL Gothic"), (13, "Cr:TTE0920")], "F", "OFL-1.1") == "none"
    for record in [(13, "Licensed under the Apache License"), (0, "GNU General Public License"), OFL_RECORD]:
        with pytest.raises(BuildError, match="F: the package says public-domain"):
            check_names([record], "F", "public-domain")


def test_table_and_copyright_file_must_agree():
    face = Face("F", "fonts-f", "truetype/f.ttf", 0, "Apache-2.0", "sans")
    text = HEAD + "Files: *\nCopyright: A\nLicense: OFL-1.1"
    with pytest.raises(BuildError, match=r"table says Apache-2\.0, the copyright file OFL-1\.1"):
        check_face(face, "1.0", text, [])


# --- packages ---------------------------------------------------------------------------------------------


@pytest.fixture
def debian(monkeypatch):
    """The two tools are found; what is run is up to the test, and fails it if it does not say."""
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(build_sample, "_run", lambda *arguments: pytest.fail(f"ran {arguments[0]}"))


def test_not_on_debian_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(BuildError, match=r"apt-get not found.*Debian"):
        build_sample.fetch_package("fonts-a", tmp_path)


def test_failed_download_names_apt_get_update(monkeypatch, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool, script in (
        ("apt-get", "echo 'E: Unable to locate package' >&2; exit 100"),
        ("dpkg-deb", "exit 1"),
    ):
        (tools / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
    with pytest.raises(BuildError, match=r"fonts-a \(E: Unable to locate package\); run `apt-get update`"):
        build_sample.fetch_package("fonts-a", tmp_path)
    (tmp_path / "fonts-a_1_all.deb").touch()  # cut short: unpacking fails, and leaves nothing that looks done
    for _ in range(2):
        with pytest.raises(BuildError, match=r"cannot unpack .*fonts-a_1_all\.deb.*delete it"):
            build_sample.fetch_package("fonts-a", tmp_path)


def test_package_at_hand_is_neither_downloaded_nor_unpacked_again(debian, tmp_path):
    (tmp_path / "fonts-a_1_all.deb").touch()
    root = tmp_path / "unpacked" / "fonts-a_1_all"
    root.mkdir(parents=True)
    assert build_sample.fetch_package("fonts-a", tmp_path) == root


def test_two_versions_of_a_package_are_refused(debian, tmp_path):
    for version in ("1", "2"):
        (tmp_path / f"fonts-a_{version}_all.deb").touch()
    with pytest.raises(BuildError, match=r"fonts-a_1_all\.deb, fonts-a_2_all\.deb"):
        build_sample.fetch_package("fonts-a", tmp_path)


# --- rendering, with a font drawn here --------------------------------------------------------------------

BLANK, TOFU = 0x4E10, (0x4E20, 0x4E21, 0x4E22)
DRAWN = range(0x4E00, 0x4E08)


def draw_font(path: Path, seed: int, licence: str) -> None:
    """Eight characters of random bars, one blank, three with the same box, and a mapped letter."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")
    generator = np.random.default_rng(seed)

    def glyph(boxes):
        pen = pens.TTGlyphPen(None)
        for left, bottom, right, top in boxes:
            pen.moveTo((left, bottom))
            for point in ((left, top), (right, top), (right, bottom)):
                pen.lineTo(point)
            pen.closePath()
        return pen.glyph()

    glyphs = {".notdef": glyph([]), "blank": glyph([]), "tofu": glyph([(0, 0, 900, 900)]), "A": glyph([])}
    for code in DRAWN:
        corners = generator.integers(0, 500, (4, 2))
        glyphs[f"c{code:x}"] = glyph([(x, y, x + 350, y + 90) for x, y in corners.tolist()])
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(
        {
            **{code: f"c{code:x}" for code in DRAWN},
            **dict.fromkeys(TOFU, "tofu"),
            BLANK: "blank",
            ord("A"): "A",
        }
    )
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Regular", "licenseDescription": licence})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


@pytest.fixture
def packages(debian, monkeypatch, tmp_path):
    """A work directory with two unpacked packages of one drawn font each, and a table that names them."""
    pytest.importorskip("PIL")
    pytest.importorskip("tqdm")
    faces = []
    for seed, name in enumerate(("a", "b")):
        root = tmp_path / "work" / "unpacked" / f"fonts-{name}_1%3a{seed}_all"
        draw_font(root / "usr/share/fonts/truetype" / f"{name}.ttf", seed, OFL_RECORD[1])
        notice = root / "usr/share/doc" / f"fonts-{name}" / "copyright"
        notice.parent.mkdir(parents=True)
        notice.write_text(f"{HEAD}Files: *\nCopyright: 2020 {name} <{name}@example.org>\nLicense: OFL-1.1{PACKAGING}")
        (tmp_path / "work" / f"{root.name}.deb").touch()
        faces.append(Face(f"Face {name}", f"fonts-{name}", f"truetype/{name}.ttf", 0, "OFL-1.1", "bars"))
    monkeypatch.setattr(build_sample, "read_faces", lambda: tuple(faces))
    return tmp_path / "work"


def test_glyphs_are_cropped_to_the_ink_and_centred(tmp_path):
    image_font = pytest.importorskip("PIL.ImageFont")
    draw_font(tmp_path / "f.ttf", 0, "")
    codes = np.array([TOFU[0], BLANK, DRAWN[0]])
    images = build_sample.render_codes(tmp_path / "f.ttf", 0, codes, bits=8)
    rows, columns = np.nonzero(images[0])
    size = int(np.ceil(0.9 * build_sample.FONT_SIZE))  # the box fills .9 em
    assert (rows.min(), rows.max() + 1) == (columns.min(), columns.max() + 1)
    assert rows.max() + 1 - rows.min() == size
    assert abs((rows.min() + rows.max() + 1) / 2 - 16) <= 0.5
    assert not images[1].any()
    large = image_font.truetype(tmp_path / "f.ttf", 60, layout_engine=image_font.Layout.BASIC)
    shrunk = build_sample.render_glyph(large, chr(DRAWN[0]))  # larger than 32 x 32: made smaller, not cut
    height, width = np.ptp(np.nonzero(shrunk), axis=1) + 1
    usual_height, usual_width = np.ptp(np.nonzero(images[2]), axis=1) + 1
    assert max(height, width) == 32 > max(usual_height, usual_width)
    assert height / width == pytest.approx(usual_height / usual_width, rel=0.1)


def test_build_drops_blanks_and_boxes_and_writes_a_sample_that_loads(packages, tmp_path, capsys):
    out = tmp_path / "out" / "sample.npz"
    arguments = ["--out", str(out), "--work-dir", str(packages), "--characters", "6", "--seed", "1"]
    assert build_sample.main(arguments) == 0
    built = load_sample(out)
    assert built.faces == ["Face a", "Face b"]
    assert built.images.shape == (6, 2, 32, 32)
    assert has_ink(built.images.reshape(12, 32, 32)).all()
    assert {ord(character) for character in built.characters} <= set(DRAWN)
    text = out.with_name("FACES.md").read_text()
    assert "| Face b | bars | fonts-b 1:1 | `truetype/b.ttf`, 0 | OFL-1.1 |" in text
    assert "2020 b <b@example.org>" in text
    assert "--characters 6 --seed 1 --bits 4" in text
    printed = capsys.readouterr().out
    assert "maps     12,      1 blank,    3 shared, draws      8" in printed

    first = out.read_bytes()
    assert build_sample.main(arguments) == 0
    assert out.read_bytes() == first
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "Apache-2.0.txt",
        "FACES.md",
        "OFL-1.1.txt",
        "sample.npz",
    ]


def test_build_refuses_a_font_whose_name_table_says_gpl(packages, tmp_path, capsys):
    draw_font(
        packages / "unpacked/fonts-b_1%3a1_all/usr/share/fonts/truetype/b.ttf",
        1,
        "GNU General Public License",
    )
    out = tmp_path / "out.npz"
    assert build_sample.main(["--out", str(out), "--work-dir", str(packages), "--characters", "2"]) == 1
    assert "error: Face b: the package says OFL-1.1" in capsys.readouterr().err
    assert not out.exists()


def test_build_says_how_many_characters_there_are(packages, tmp_path, capsys):
    out = tmp_path / "out.npz"
    assert build_sample.main(["--out", str(out), "--work-dir", str(packages), "--characters", "9"]) == 1
    assert "error: only 8 characters are drawn by all faces" in capsys.readouterr().err
    assert not out.exists()


def test_failed_write_keeps_the_old_file_and_leaves_no_litter(monkeypatch, tmp_path):
    path = tmp_path / "sample.npz"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(build_sample.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        build_sample.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arguments", [["--characters", "0"], ["--bits", "5"], ["--seed", "x"], ["--colour", "1"]])
def test_bad_options_are_refused(debian, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_sample.main(arguments)
    assert arguments[0] in capsys.readouterr().err
