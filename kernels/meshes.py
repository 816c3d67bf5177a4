"""Arrays sharded over a mesh's `Explicit` axes, along the images: each device renders its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def is_explicit(array: Array) -> bool:
    """Whether an array's type says how it is sharded."""
    mesh = jax.typeof(array).sharding.mesh
    return AxisType.Explicit in mesh.axis_types


def map_images(
    render: Callable, inputs: dict[str, Array], batch: tuple[int, ...], capacity: int | None
) -> Any:
    """`render(inputs, capacity)`, by `shard_map` over the axes that shard the images of `viewmats`.

    Arrays with the leading shape `batch` are split as they are; the others are whole everywhere.
    """
    aval = jax.typeof(inputs["viewmats"])
    mesh, spec = aval.sharding.mesh, PartitionSpec(*aval.sharding.spec[: len(batch)])
    ranks = {"means": 2, "quats": 2, "scales": 2, "opacities": 1}
    ranks |= {"colors": 2, "sh": 3, "background": 1}
    specs = {
        name: PartitionSpec() if array.ndim == ranks.get(name) else spec
        for name, array in inputs.items()
    }

    @jax.jit
    def run(inputs):
        laid_out = {
            name: jax.sharding.reshard(array, NamedSharding(mesh, specs[name]))
            for name, array in inputs.items()
        }
        return jax.shard_map(
            lambda inputs: render(inputs, capacity), mesh=mesh, in_specs=(specs,), out_specs=spec
        )(laid_out)

    return run(inputs)
