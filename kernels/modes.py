"""The modes of JAX that the kernels are written for, whatever the caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard() -> Iterator[None]:
    """Within, numbers are of 32 bits and types promote as usual."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield
