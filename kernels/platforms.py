"""Which platform JAX takes, for commands to settle before it looks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import jax

_OF_TPU_HOSTS = (
    *("TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"),
    *("TPU_TOPOLOGY", "TPU_CHIPS_PER_HOST_BOUNDS", "CLOUD_TPU_TASK_ID", "JAX_FORCE_TPU_INIT"),
)
"""Variables that a TPU's host, its node pool or whoever insists on it sets."""

_GOOGLE = "0x1ae0"  # PCI vendor


def look_for_no_absent_tpu() -> None:
    """Settles on CPUs where libtpu is installed for its compiler alone, as for the tests.

    JAX would have it look for a TPU, and print what it misses. Whatever may be a TPU's host, names
    its platform (`JAX_PLATFORMS`) or has another accelerator's plugin is left to JAX. To be called
    before JAX has made its first array.
    """
    installed = importlib.util.find_spec("libtpu") is not None
    if installed and not (jax.config.jax_platforms or _may_have_a_tpu() or _has_plugins()):
        jax.config.update("jax_platforms", "cpu")


def _may_have_a_tpu() -> bool:
    if any(name in os.environ for name in _OF_TPU_HOSTS):
        return True
    devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return bool(devices) or any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def _has_plugins() -> bool:
    """Whether JAX has platforms beside CPU and TPU."""
    return bool(importlib.metadata.entry_points(group="jax_plugins"))
