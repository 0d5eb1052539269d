"""The faces of the bundled sample, and the check that the licence of each allows it.

``faces.tsv`` is the table of faces. A face passes if the copyright file of its Debian package (machine-readable, format
1.0) puts it under the OFL, Apache-2.0 or the public domain, as the table says, and the name table of the font does not
contradict that. ``describe_faces`` writes FACES.md from what was found.
"""

from __future__ import annotations

import csv
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

FACES_TSV = Path(__file__).parent / "faces.tsv"
LICENCE_TEXTS = ("OFL-1.1.txt", "Apache-2.0.txt")  # in the folder of the bundled sample

# The short names of licences in Debian's copyright files -> the names used here. Any other licence is refused.
ALLOWED_LICENCES = {
    "ofl-1.1": "OFL-1.1",
    "sil-1.1": "OFL-1.1",
    "apache-2.0": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "public-domain": "public-domain",
    "public domain": "public-domain",
}
LICENCES = tuple(dict.fromkeys(ALLOWED_LICENCES.values()))
# What the name table of a font may state.
STATED_LICENCES = {
    "OFL-1.1": r"Open Font Licen[cs]e|\bOFL\b",
    "Apache-2.0": r"\bApache\b",
    "public-domain": r"public domain",
    "another licence": r"\bGPL\b|General Public|Arphic|Creative Commons|\bIPA Font|M\+ FONTS? LICEN[CS]E",
}
COPYRIGHT_ID, LICENCE_ID = 0, 13  # ids of records in a name table
LICENCE_IDS = (COPYRIGHT_ID, 7, 10, LICENCE_ID, 14)  # also trademark, description and the address of the licence

FACES_MD = """\
# The faces of the bundled sample

`han_sample.npz`: {summary}

Only faces under the SIL Open Font License 1.1 (OFL), the Apache License 2.0 or in the public domain are used.
The licence of each was read from its Debian package's copyright file and held against the font's name table
(last column: what that states). There is no font program in the sample, only small grey drawings. The licence
texts are beside this file: [OFL-1.1.txt](OFL-1.1.txt), [Apache-2.0.txt](Apache-2.0.txt); the statements of
public domain are in the packages' copyright files.

| face | style | Debian package, version | /usr/share/fonts/, index | licence | stated in | name table |
|---|---|---|---|---|---|---|
{rows}

## Copyright notices and reserved font names

As the copyright files and the fonts have them. The OFL keeps reserved font names from modified versions of a
font: names are used here only to say whose drawings these are. None of the authors endorses the sample.

{notices}

## Rebuild

In a checkout of the repository, on Debian or Ubuntu, with Pillow, fontTools and tqdm (some 210 MB of packages are
downloaded, none is installed):

    python -m tools.build_sample {options}

`tools/faces.tsv` is the table to edit. The same package versions, Pillow and FreeType give the same bytes.
"""


class BuildError(RuntimeError):
    """The sample cannot be built; the message names the cause and the fix."""


@dataclass(frozen=True)
class Face:
    """A row of faces.tsv; the fields from ``version`` on are known once its package is unpacked and checked.

    Attributes:
        name: the name of the face.
        package: the Debian package.
        file: the path of the font, relative to usr/share/fonts of the package.
        index: the place of the face inside a .ttc collection.
        licence: one of ``LICENCES``.
        style: the style of the face, in words.
        version: the version of the package.
        notices: copyright notices, from the copyright file and the name table.
        reserved: sentences that reserve font names, as the OFL allows.
        stated: the licence that the name table of the font states, "none" where it states none.
    """

    name: str
    package: str
    file: str
    index: int
    licence: str
    style: str
    version: str = ""
    notices: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    stated: str = ""


@dataclass(frozen=True)
class FileLicence:
    """What a copyright file says about one file."""

    licence: str
    notices: tuple[str, ...]
    reserved: tuple[str, ...]


def read_faces(path: Path = FACES_TSV) -> tuple[Face, ...]:
    """Read the table of faces; lines that start with # are comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return tuple(
        Face(row["name"], row["package"], row["file"], int(row["index"]), row["licence"], row["style"])
        for row in csv.DictReader(lines, delimiter="\t")
    )


def allowed_licence(expression: str) -> str | None:
    """The allowed licence of an expression: of "A or B" the first allowed one, of "A and B" both; else None."""
    for choice in re.split(r"\s+or\s+", expression.strip(), flags=re.IGNORECASE):
        names = [ALLOWED_LICENCES.get(part.strip().lower()) for part in re.split(r"\s+and\s+|,", choice)]
        if None not in names:
            return " and ".join(sorted({str(name) for name in names}))
    return None


def read_copyright(text: str, file_name: str) -> FileLicence:
    """Read what a copyright file says about ``file_name``: the last ``Files`` paragraph that matches counts.

    Raises:
        BuildError: no paragraph matches, or the licence is not allowed.
    """
    paragraphs = [_fields(part) for part in re.split(r"\n\s*\n", text)]
    match: dict[str, str] | None = None
    for fields in paragraphs:
        patterns = fields.get("files", "").split()
        if any(fnmatch.fnmatchcase(file_name, pattern) for pattern in patterns):
            match = fields
    if match is None:
        raise BuildError(f"the package's copyright file does not cover {file_name}")
    expression, _, body = match.get("license", "").partition("\n")
    licence = allowed_licence(expression)
    if licence is None:
        raise BuildError(f"{file_name} is under {expression!r}; only {', '.join(LICENCES)} may be bundled")
    bodies = [body, match.get("comment", "")]
    for fields in paragraphs:  # a paragraph of the licence itself, if there is one
        short, _, body = fields.get("license", "").partition("\n")
        if "files" not in fields and allowed_licence(short) == licence:
            bodies.append(body)
    notices = tuple(line.strip() for line in match.get("copyright", "").splitlines() if line.strip())
    return FileLicence(licence, notices, find_reserved("\n\n".join(bodies)))


def _fields(paragraph: str) -> dict[str, str]:
    """Field names in lower case -> values; continuation lines lose their indent, " ." becomes an empty line."""
    fields: dict[str, str] = {}
    name = ""
    for line in paragraph.splitlines():
        head = re.match(r"([A-Za-z-]+):\s*(.*)", line)
        if head:
            name = head[1].lower()
            fields[name] = head[2]
        elif name:
            fields[name] += "\n" + ("" if line.strip() == "." else line.strip())
    return fields


def find_reserved(text: str) -> tuple[str, ...]:
    """The sentences that reserve font names ("with Reserved Font Name X"), not those of the licence about them."""
    hits = re.findall(r"with reserved font names?\b.*?(?:\.(?=\s|$)|\n\n|$)", text, re.IGNORECASE | re.DOTALL)
    return tuple(dict.fromkeys(" ".join(hit.split()).rstrip(".") for hit in hits))


def check_names(names: Sequence[tuple[int, str]], face: str, licence: str) -> str:
    """Compare the records (name id, text) of a font with its licence.

    Returns:
        The licence if they state it, "none" if they state none.

    Raises:
        BuildError: they state another licence.
    """
    text = "\n".join(value for key, value in names if key in LICENCE_IDS)
    stated = [name for name, pattern in STATED_LICENCES.items() if re.search(pattern, text, re.IGNORECASE)]
    if stated and licence not in stated:
        raise BuildError(f"{face}: the package says {licence}, the font's name table {' and '.join(stated)}")
    return licence if stated else "none"


def check_face(face: Face, version: str, copyright_text: str, names: Sequence[tuple[int, str]]) -> Face:
    """Check the licence of a face against its package and its name table.

    Args:
        face: a row of the table.
        version: the version of its package.
        copyright_text: the copyright file of its package.
        names: the records (name id, text) of its name table.

    Returns:
        The face with version, notices and reserved names.

    Raises:
        BuildError: the package or the name table contradicts the licence.
    """
    found = read_copyright(copyright_text, Path(face.file).name)
    if found.licence != face.licence:
        raise BuildError(f"{face.name}: the table says {face.licence}, the copyright file {found.licence}")
    stated = check_names(names, face.name, face.licence)
    notices = (*found.notices, *(" ".join(value.split()) for key, value in names if key == COPYRIGHT_ID))
    in_font = find_reserved("\n\n".join(value for key, value in names if key in (COPYRIGHT_ID, LICENCE_ID)))
    return replace(
        face,
        version=version,
        notices=tuple(dict.fromkeys(notice for notice in notices if notice)),
        reserved=tuple(dict.fromkeys((*found.reserved, *in_font))),
        stated=stated,
    )


def describe_faces(faces: Sequence[Face], summary: str, options: str) -> str:
    """The text of FACES.md.

    Args:
        faces: checked faces.
        summary: a summary of the build, in words.
        options: the options of the build command.
    """
    rows = [
        f"| {face.name} | {face.style} | {face.package} {face.version} | `{face.file}`, {face.index} "
        f"| {face.licence} | `/usr/share/doc/{face.package}/copyright` | {face.stated} |"
        for face in faces
    ]
    notices = [f"- **{face.name}**: {'; '.join((*face.notices, *face.reserved))}" for face in faces]
    return FACES_MD.format(summary=summary, rows="\n".join(rows), notices="\n".join(notices), options=options)
