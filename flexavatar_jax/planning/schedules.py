"""What Pallas kernels take on a TPU by the schedule that its compiler has made of them.

XLA reckons its own operations and not kernels. But libtpu, asked to, writes down the very
instructions of everything it compiles, bundle by bundle, a bundle a cycle: with how often their
loops go round, that is a kernel's time, short of waiting for memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ARGUMENTS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text --xla_jf_dump_llo_pass_label_regex={}"
LABEL = "final_bundles"

_FILE = re.compile(rf"\d+-(.+)-\d+-{LABEL}\.txt")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)(\{.*)", re.DOTALL)
_TEST = re.compile(r"scmp\.\w+\.[su]32\.totalorder %?\w+, (%?\w+) /\* loop exit test \*/")
_PIPELINE = "iteration index, stage"
PIPELINE_TURNS = 2
"""More turns than there are programs has the loop over programs: their arrays come a turn before
them, and go a turn after."""


class Bundle(NamedTuple):
    """What a TPU core does in one cycle."""

    starts_loop: bool
    depth: int
    """Loops around it; 0 where the listing doesn't say."""
    text: str


def write_schedules(folder: str | os.PathLike[str]) -> None:
    """Has libtpu write the schedules of what it compiles to `folder`.

    It has to come before the process first compiles for TPUs.
    """
    arguments = ARGUMENTS.format(folder, LABEL)
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {arguments}".strip()


def kernel_cycles(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Cycles of every operation that `folder` has the schedule of, by the name it has in HLO.

    Left out are those with loops that go round as often as their data say.
    """
    found = {}
    for path in sorted(Path(folder).iterdir()):
        name = _FILE.fullmatch(path.name)
        if name and (cycles := count_cycles(path.read_text())) is not None:
            found[name[1]] = cycles
    return found


def count_cycles(listing: str) -> int | None:
    """Bundles of a listing, each as often as it is executed; None where that isn't known.

    Both sides of a condition count.
    """
    return _count(list(_bundles(listing)))


def _bundles(listing: str) -> Iterator[Bundle]:
    """A bundle begins with its address; comments in it go over many lines."""
    head, lines = None, []
    for line in listing.splitlines():
        if match := _BUNDLE.match(line):
            if head:
                yield Bundle(*head, "\n".join(lines))
            head, lines = (match[1] == "LB", match[2].count(">")), [match[3]]
        else:
            lines.append(line)
    if head:
        yield Bundle(*head, "\n".join(lines))


def _count(bundles: list[Bundle]) -> int | None:
    total, i = 0, 0
    while i < len(bundles):
        if not bundles[i].starts_loop:
            total, i = total + 1, i + 1
            continue
        end = _loop_end(bundles, i)
        cycles, turns = _loop(bundles[i:end])
        if cycles is None or turns is None:
            return None
        total, i = total + cycles * turns, end
    return total


def _loop_end(bundles: list[Bundle], start: int) -> int:
    """The end of a loop: that of the bundles as deep, before the next loop beside or around it."""
    depth, end = bundles[start].depth, start + 1
    for i in range(start + 1, len(bundles)):
        if bundles[i].starts_loop and bundles[i].depth <= depth:
            break
        if bundles[i].depth >= depth:
            end = i + 1
    return end


def _loop(bundles: list[Bundle]) -> tuple[int | None, int | None]:
    """Cycles of a turn of a loop, and how many there are."""
    first, rest = bundles[0], bundles[1:]
    inside = _count(rest)
    own, i = [first], 0
    while i < len(rest):
        if rest[i].starts_loop:
            i = _loop_end(rest, i)
        else:
            own.append(rest[i])
            i += 1
    tests = [test for bundle in own for test in _TEST.finditer(bundle.text)]
    if inside is None or not tests or not tests[-1][1].isdigit():
        return None, None
    turns = int(tests[-1][1])
    if first.depth == 1 and any(_PIPELINE in bundle.text for bundle in own):
        turns -= PIPELINE_TURNS
    return 1 + inside, turns
