"""What a compiled program does and how often, read from its HLO text: collectives and cycles."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_REGULAR_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_NOTE = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_CYCLES = 2**63 - 1
"""What the TPU compiler gives for what it puts no figure to, such as gathers by the SparseCore."""
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


_NAME = re.compile(r"%([\w.\-]+) = ")
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call"')
_ESTIMATE = re.compile(r'"(flops|transcendentals|bytes_accessed)":"(\d+)"')


class Kernel(NamedTuple):
    """A Pallas kernel that says what it costs (`pl.CostEstimate`), as often as it runs."""

    name: str
    """Of the instruction."""
    operation: str
    """XLA's note of what it was made for, with its name: ".../attention_forward/pallas_call"."""
    runs: int
    flops: int
    """Of the matrix unit, each time."""
    transcendentals: int
    bytes: int


class Collective(NamedTuple):
    """One collective operation, as often as it runs."""

    kind: str
    """One of KINDS."""
    group: int
    """Devices that take part together."""
    bytes: float
    """Of the whole array: what all-gather puts out, what reduce-scatter takes in."""
    operation: str
    """XLA's note of what it was made for, such as "jit(step)/.../reduce_sum"."""

    @property
    def sent(self) -> float:
        """Bytes a device sends, in the best of algorithms."""
        share = (self.group - 1) / self.group
        if self.kind == "collective-permute":
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes


def collectives(hlo: str) -> list[Collective]:
    """All collectives of an optimised module; those in a loop count each time round."""
    bodies = _computations(hlo)
    runs = _runs(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _OPERATION.search(line)
            if not match:
                continue
            shapes, kind, started = match.groups()
            group = _group(line)
            size = sum(_size(dtype, dims) for dtype, dims in _ARRAY.findall(shapes))
            # What a start puts out holds its operands too.
            if started and kind in ("all-gather", "reduce-scatter"):
                size *= group / (group + 1)
            elif started and kind in ("all-to-all", "collective-permute"):
                size /= 2
            elif kind == "reduce-scatter":
                size *= group
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            note = _NOTE.search(line)
            found += [Collective(kind, group, size, note[1] if note else "")] * runs[name]
    return [c for c in found if c.group > 1]


def estimated_cycles(hlo: str, scopes: Sequence[str]) -> dict[str, int]:
    """What the TPU compiler reckons a module's operations take, by `jax.named_scope`.

    Those in a loop count each time round. Operations of no scope come as "other". The compiler puts
    no figure to Pallas kernels, collectives, sorts, gathers and scatters: they are not in it.
    """
    inside = re.compile(rf"\b({'|'.join(scopes)})\b")
    bodies = _computations(hlo)
    runs = _runs(bodies)
    total = collections.Counter(dict.fromkeys([*scopes, "other"], 0))
    for name, lines in bodies.items():
        for line in lines:
            cycles = _CYCLES.search(line)
            if not cycles or int(cycles[1]) == _NO_CYCLES:
                continue
            note = _NOTE.search(line)
            scope = inside.search(note[1]) if note else None
            total[scope[1] if scope else "other"] += runs[name] * int(cycles[1])
    return dict(total)


def kernels(hlo: str) -> list[Kernel]:
    """All Pallas kernels of an optimised module that say what they cost."""
    bodies = _computations(hlo)
    runs = _runs(bodies)
    found = []
    for name, lines in bodies.items():
        for line in filter(_KERNEL.search, lines):
            costs = {key: int(value) for key, value in _ESTIMATE.findall(line)}
            note, own = _NOTE.search(line), _NAME.search(line)
            if costs:
                values = (costs[key] for key in ("flops", "transcendentals", "bytes_accessed"))
                found.append(Kernel(own[1], note[1] if note else "", runs[name], *values))
    return found


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation, by name; the entry's comes as "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        if not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            current = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        else:
            current.append(line)
    return bodies


def _runs(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs."""
    called: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            times = _trips(line, bodies) if " while(" in line else 1
            for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                if callee in called:
                    called[callee].append((name, times))
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for callee in re.findall(r"[\w.\-]+", group):
                    called[callee].append((name, 1))

    def runs(name: str) -> int:
        if name == "ENTRY":
            return 1
        return sum(runs(caller) * count for caller, count in called[name])

    return {name: runs(name) for name in bodies}


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop goes round; 1 where the module doesn't say.

    The CPU compiler notes it. The TPU compiler leaves what JAX's scans have for a condition: a
    counter from 0 that is less than a constant.
    """
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = "\n".join(bodies.get(re.search(r"condition=%?([\w.\-]+)", line)[1], []))
    constants = dict(re.findall(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", condition))
    root = re.search(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT", condition)
    return int(constants.get(root[1], 1)) if root else 1


def _size(dtype: str, dims: str) -> float:
    """Bytes of an array."""
    bits = re.sub(r"\D.*", "", dtype.lstrip("bfsue")) if dtype not in _BYTES else ""
    width = _BYTES.get(dtype) or int(bits or 8) / 8
    return math.prod(int(d) for d in dims.split(",") if d) * width


def _group(line: str) -> int:
    """Devices in one group, in whichever of three ways groups are written."""
    if match := _LISTED_GROUPS.search(line):
        return len(match[1].split(","))
    if match := _REGULAR_GROUPS.search(line):
        return int(match[1])
    if match := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # An axis, or a part of one: 'axis':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 2  # a collective-permute, which says pairs
