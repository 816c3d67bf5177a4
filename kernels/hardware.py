"""Published rates of the chips that this project runs on or predicts for, each said once."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Published rates of a TPU chip, all its TensorCores together."""

    topology: str
    """The smallest slice that libtpu compiles for."""
    bandwidth: float
    """HBM, bytes a second."""
    bfloat16: float
    """Matrix unit, operations a second."""
    float32: float
    """Vector unit: cores x 8 x 128 lanes x 4 units x clock, operations a second."""
    memory: int
    """HBM, bytes."""
    clock: float
    """Of the TensorCores, cycles a second."""
    link: float
    """One link of the interconnect in one direction, bytes a second."""


CHIPS = {
    "v4": Chip("v4:2x2x1", 1.228e12, 275e12, 2 * 4096 * 1.05e9, 32 << 30, 1.05e9, 45e9),
    "v5e": Chip("v5e:2x2", 0.819e12, 197e12, 4096 * 1.5e9, 16 << 30, 1.5e9, 45e9),
    "v5p": Chip("v5p:2x2x1", 2.765e12, 459e12, 2 * 4096 * 1.75e9, 95 << 30, 1.75e9, 90e9),
    "v6e": Chip("v6e:2x2", 1.64e12, 918e12, 4096 * 1.75e9, 32 << 30, 1.75e9, 90e9),
}
"""TPUs by generation. Sources: Google Cloud's system architecture pages of TPU v4, v5e, v5p and v6e
for bandwidth, bfloat16 rate and memory; the clock follows from the bfloat16 rate and the number and
size of the matrix units (four a core; 128x128, v6e 256x256); the vector unit and the links are
those of Austin et al., How to Scale Your Model (2025), chapter 2."""

BFLOAT16_PEAKS = {
    "TPU v4": CHIPS["v4"].bfloat16,
    "TPU v5 lite": CHIPS["v5e"].bfloat16,
    "TPU v5e": CHIPS["v5e"].bfloat16,
    "TPU v5": CHIPS["v5p"].bfloat16,
    "TPU v5p": CHIPS["v5p"].bfloat16,
    "TPU v6 lite": CHIPS["v6e"].bfloat16,
    "TPU v6e": CHIPS["v6e"].bfloat16,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}
"""Dense bfloat16 peak of a device, operations a second, by JAX's `device_kind`. Sources: as for
`CHIPS`; NVIDIA's data sheets of the A100, H100 and H200."""
