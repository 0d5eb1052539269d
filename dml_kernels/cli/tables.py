"""Tables for the terminal: by rich if it is installed, else as aligned plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

PLAIN_WIDTH = 110


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print one table. Without a header it is a table of facts: name and value."""
    rows = [tuple(str(cell) for cell in row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _show_plain(title, header, rows)
        return
    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=bool(header))
    for name in header or [""] * len(rows[0]):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text takes brackets in a cell literally
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    console.print(table)


def _show_plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = ([tuple(header)] if header else []) + list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    widths[-1] = 0  # nothing to align after the last column
    print(f"\n{title}\n{'-' * len(title)}")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
