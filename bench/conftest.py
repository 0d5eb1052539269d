"""`pytest bench/`: one test per contender, and a clock that replays interleaved times to pytest-benchmark.

pytest-benchmark times one test after another, so a change of the clock rate or of a neighbour's load between two tests
shows as a difference between contenders. Here the first test of a group measures the whole group in interleaved rounds,
and each test hands its own times to pytest-benchmark through a clock that advances by exactly these times.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .harness import Runner
from .options import add_options, read_options

RUNNER = pytest.StashKey[Runner]()


class ReplayClock:
    """The clock that pytest-benchmark reads."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recorded: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += next(self.recorded)


CLOCK = ReplayClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("bench", "what to measure").addoption)


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[RUNNER] = Runner(read_options(config.option))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.stash[RUNNER].options
    pairs = [(group, c.name) for group in options.groups() for c in options.contenders(group)]
    metafunc.parametrize(("group", "name"), pairs, ids=[f"{group}: {name}" for group, name in pairs])
