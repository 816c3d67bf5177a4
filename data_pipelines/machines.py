"""Machines that training runs on: what of cores, memory and network a host has, each said once."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from data_pipelines.errors import UserError


class Machine(NamedTuple):
    """A type of machine, as its provider publishes it."""

    name: str
    chips: int
    """TPU chips or GPUs of a host."""
    processes: int
    """Of a run on a host, as the recipes in launch/ start them."""
    cores: int
    """Virtual ones, two of which share a core of the processor."""
    memory: float
    """Bytes."""
    network: float
    """To everywhere but the other accelerators, bytes a second."""


_GIGABIT = 1e9 / 8

MACHINES = {
    "v5e": Machine("ct5lp-hightpu-4t", 4, 1, 112, 192e9, 100 * _GIGABIT),
    "v5p": Machine("ct5p-hightpu-4t", 4, 1, 208, 448e9, 200 * _GIGABIT),
    "v6e": Machine("ct6e-standard-4t", 4, 1, 180, 720e9, 400 * _GIGABIT),
    "a100": Machine("a2-ultragpu-8g", 8, 8, 96, 1360e9, 100 * _GIGABIT),
    "h100": Machine("a3-highgpu-8g", 8, 8, 208, 1872e9, 200 * _GIGABIT),
}
"""Hosts of Google Cloud by accelerator. Sources: its pages on TPUs in GKE (cores, memory), on v5e,
v5p and v6e (a host's network; half of it where the machine has half of a host's chips), and on
accelerator-optimized machines (GPUs; of an a3 the one card that is not for its GPUs)."""

EXAMPLES = "v5e:16x16, v6e:4x4 or h100:2 (two hosts)"


def parse_topology(text: str) -> tuple[Machine, int]:
    """The machine and the number of hosts of a slice of TPUs or of a number of GPU hosts.

    Args:
      text: such as "v5e:16x16", whose chips are counted, or "h100:2".

    Raises:
      UserError: an unknown accelerator, or chips that are no whole number of hosts.
    """
    name, _, shape = text.partition(":")
    if name not in MACHINES or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", shape):
        raise UserError(
            f"--topology is {text!r}; expected one of {', '.join(MACHINES)} and its size, such as "
            f"{EXAMPLES}"
        )
    machine, sides = MACHINES[name], [int(side) for side in shape.split("x")]
    if len(sides) == 1:
        return machine, sides[0]
    hosts, rest = divmod(math.prod(sides), machine.chips)
    if rest:
        raise UserError(
            f"--topology {text} has {math.prod(sides)} chips, which are no whole number of hosts "
            f"of {machine.chips}"
        )
    return machine, hosts
