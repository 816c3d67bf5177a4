"""Arrays sharded over a mesh's `Explicit` axes, along the images: each device renders its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from kernels.arguments import RANKS


def is_explicit(array: Array) -> bool:
    """Whether an array's type says how it is sharded."""
    mesh = jax.typeof(array).sharding.mesh
    return AxisType.Explicit in mesh.axis_types


def map_images(function: Callable, inputs: dict[str, Array], like: str) -> Any:
    """`function(inputs)`, by `shard_map` over the axes that shard the images of `inputs[like]`.

    Arrays with leading axes of images are split along those that they have.
    """
    aval, batch = jax.typeof(inputs[like]), inputs[like].ndim - RANKS[like]
    mesh, spec = aval.sharding.mesh, aval.sharding.spec[:batch]
    specs = {
        name: PartitionSpec(*spec[: array.ndim - RANKS[name]]) for name, array in inputs.items()
    }

    @jax.jit
    def run(inputs):
        laid_out = {
            name: jax.sharding.reshard(array, NamedSharding(mesh, specs[name]))
            for name, array in inputs.items()
        }
        return jax.shard_map(
            function, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(*spec)
        )(laid_out)

    return run(inputs)
