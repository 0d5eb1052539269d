"""Options shared by `python -m bench` and `pytest bench/`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from dml_kernels.cli.arguments import integer, number, threads

from . import problem
from .harness import SIZES_OF, SUITES, Options
from .problem import DTYPES, Size

MEMORY = ("losses", "all", "none")
DEFAULTS = Options()


def add_options(add: Callable[..., Any]) -> None:
    """Declare the options by argparse's add_argument or pytest's addoption."""
    quick, default = _joined(problem.QUICK_SIZES), f"default {_joined(problem.SIZES)}"
    own = "; ".join(f"{suite} {_joined(sizes)}" for suite, sizes in SIZES_OF.items())
    size_help = f"sizes of every suite, such as 512x100kx128; {default}; {own}"
    budget_help = "timing of one contender in one group; slow ones get fewer rounds; default %(default)g"
    memory_help = "whose peak memory to take, in a process for each contender; default %(default)s"
    add("--sizes", metavar="NxMxD,...", help=size_help)
    add("--dtypes", metavar="TYPE,...", help=f"of {', '.join(DTYPES)}; default {','.join(DEFAULTS.dtypes)}")
    add("--suites", metavar="NAME,...", help=f"of {', '.join(SUITES)}; default all")
    add("--only", metavar="TEXT,...", help="only contenders with one of these in their name, and the floor")
    add(
        "--rounds", type=integer(1, 10_000), metavar="K", help=f"interleaved; default {DEFAULTS.rounds}, 3 with --quick"
    )
    add("--budget", type=number(0, 86_400, above=True), default=DEFAULTS.budget, metavar="SECONDS", help=budget_help)
    add("--threads", type=threads(), default=0, metavar="T", help="default: PyTorch's own number")
    add("--memory", choices=MEMORY, default=DEFAULTS.memory, help=memory_help)
    add("--quick", action="store_true", help=f"a try of the whole path at small sizes: {quick}")


def read_options(found: argparse.Namespace) -> Options:
    """Convert parsed arguments to Options. Raises ValueError with the choices for an unknown name."""
    small = problem.QUICK_SIZES if found.quick else None
    sizes = tuple(map(Size.parse, _split(found.sizes))) if found.sizes else small
    rounds = found.rounds if found.rounds is not None else 3 if found.quick else DEFAULTS.rounds
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {rounds}")
    return Options(
        suites=_known("--suites", found.suites, SUITES, SUITES),
        sizes=sizes or (),
        dtypes=_known("--dtypes", found.dtypes, tuple(DTYPES), DEFAULTS.dtypes),
        only=_split(found.only),
        rounds=rounds,
        budget=found.budget,
        memory=found.memory,
        threads=found.threads,
    )


def _joined(sizes: Sequence[Size]) -> str:
    return ", ".join(map(str, sizes))


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _known(option: str, text: str | None, choices: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    names = _split(text) or default
    for name in names:
        if name not in choices:
            raise ValueError(f"{option}: {name!r} is not one of {', '.join(choices)}")
    return names
