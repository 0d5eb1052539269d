"""Which faces the bundled sample draws on, and the proof that each may be bundled.

`faces.tsv` is the table. A face passes if its Debian package's copyright file (machine-readable, format
1.0) puts it under the OFL, Apache-2.0 or the public domain, as the table says, and the font's own name table
does not contradict that. `describe_faces` writes FACES.md from what was found.
"""

from __future__ import annotations

import csv
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

FACES_TSV = Path(__file__).parent / "faces.tsv"
LICENCE_TEXTS = ("OFL-1.1.txt", "Apache-2.0.txt")  # beside the bundled sample

# Short names of licences as Debian's copyright files spell them -> ours. Anything else is refused.
ALLOWED_LICENCES = {
    "ofl-1.1": "OFL-1.1",
    "sil-1.1": "OFL-1.1",
    "apache-2.0": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "public-domain": "public-domain",
    "public domain": "public-domain",
}
LICENCES = tuple(dict.fromkeys(ALLOWED_LICENCES.values()))
# What a font's name table may state.
STATED_LICENCES = {
    "OFL-1.1": r"Open Font Licen[cs]e|\bOFL\b",
    "Apache-2.0": r"\bApache\b",
    "public-domain": r"public domain",
    "another licence": r"\bGPL\b|General Public|Arphic|Creative Commons|\bIPA Font|M\+ FONTS? LICEN[CS]E",
}
COPYRIGHT_ID, LICENCE_ID = 0, 13  # of name table records
LICENCE_IDS = (COPYRIGHT_ID, 7, 10, LICENCE_ID, 14)  # with trademark, description and licence address

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
    """A row of faces.tsv; the fields from `version` on are known once its package is unpacked and checked.

    Attributes:
        file: relative to usr/share/fonts of the package; `index` counts inside a .ttc collection.
        notices: copyright notices, from the copyright file and the name table.
        reserved: sentences that reserve font names (an OFL matter).
        stated: the licence that the font's name table states, "none" where it is silent.
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
    """Reads the table of faces; lines that start with # are comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return tuple(
        Face(row["name"], row["package"], row["file"], int(row["index"]), row["licence"], row["style"])
        for row in csv.DictReader(lines, delimiter="\t")
    )


def allowed_licence(expression: str) -> str | None:
    """Our name of a licence expression: of "A or B" the first choice allowed, of "A and B" both or None."""
    for choice in re.split(r"\s+or\s+", expression.strip(), flags=re.IGNORECASE):
        names = [ALLOWED_LICENCES.get(part.strip().lower()) for part in re.split(r"\s+and\s+|,", choice)]
        if None not in names:
            return " and ".join(sorted({str(name) for name in names}))
    return None


def read_copyright(text: str, file_name: str) -> FileLicence:
    """What a copyright file says about `file_name`: the last `Files` paragraph that matches.

    Raises:
        BuildError: no paragraph matches, or the licence is not an allowed one.
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
    for fields in paragraphs:  # the licence's own paragraph, where there is one
        short, _, body = fields.get("license", "").partition("\n")
        if "files" not in fields and allowed_licence(short) == licence:
            bodies.append(body)
    notices = tuple(line.strip() for line in match.get("copyright", "").splitlines() if line.strip())
    return FileLicence(licence, notices, find_reserved("\n\n".join(bodies)))


def _fields(paragraph: str) -> dict[str, str]:
    """Field name in lower case -> value; continuation lines lose their indent, " ." becomes an empty line."""
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
    """The sentences that reserve font names ("with Reserved Font Name X"), not the licence's talk of them."""
    hits = re.findall(r"with reserved font names?\b.*?(?:\.(?=\s|$)|\n\n|$)", text, re.IGNORECASE | re.DOTALL)
    return tuple(dict.fromkeys(" ".join(hit.split()).rstrip(".") for hit in hits))


def check_names(names: Sequence[tuple[int, str]], face: str, licence: str) -> str:
    """Holds a font's (name id, text) records against its licence; what they state, "none" where silent.

    Raises:
        BuildError: the name table states another licence.
    """
    text = "\n".join(value for key, value in names if key in LICENCE_IDS)
    stated = [name for name, pattern in STATED_LICENCES.items() if re.search(pattern, text, re.IGNORECASE)]
    if stated and licence not in stated:
        raise BuildError(f"{face}: the package says {licence}, the font's name table {' and '.join(stated)}")
    return licence if stated else "none"


def check_face(face: Face, version: str, copyright_text: str, names: Sequence[tuple[int, str]]) -> Face:
    """The face with version, notices and reserved names, if package and name table bear out its licence.

    Raises:
        BuildError: they do not.
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
    """The text of FACES.md for checked faces; `options` are those of the build command."""
    rows = [
        f"| {face.name} | {face.style} | {face.package} {face.version} | `{face.file}`, {face.index} "
        f"| {face.licence} | `/usr/share/doc/{face.package}/copyright` | {face.stated} |"
        for face in faces
    ]
    notices = [f"- **{face.name}**: {'; '.join((*face.notices, *face.reserved))}" for face in faces]
    return FACES_MD.format(summary=summary, rows="\n".join(rows), notices="\n".join(notices), options=options)
