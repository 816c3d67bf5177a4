"""Where arrays live: the device mesh and the one table that lays parameters out on it.

The mesh has three axes. `data` splits the batch and repeats the parameters, `fsdp` splits the batch
and the parameters, `tensor` splits the parameters' wide dimensions. Parameters name their
dimensions by logical axes (metadata `logical_axes` of each `nnx.Param`); RULES maps those to the
mesh. The design follows the logical axis rules of MaxText and T5X.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "channels_in": "fsdp",
    "channels_out": "tensor",
    None: None,
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices, or over `devices`.

    One size may be -1: it takes what the others leave. Between slices of devices, which are GPU
    nodes or TPU slices, the network is slower than within: `data` goes over it as far as it can,
    then `fsdp`.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or need slices split.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    given = int(np.prod([n for n in sizes.values() if n != -1]))
    free = [axis for axis, n in sizes.items() if n == -1]
    if len(free) > 1 or any(n == 0 or n < -1 for n in sizes.values()):
        raise UserError(f"config.mesh {sizes} must have positive sizes and at most one -1")
    if free and len(devices) % given == 0:
        sizes[free[0]] = len(devices) // given
    shape = tuple(sizes.values())
    if -1 in shape or int(np.prod(shape)) != len(devices):
        raise UserError(
            f"config.mesh (data, fsdp, tensor) = ({data}, {fsdp}, {tensor}) does not fit "
            f"{len(devices)} devices; the sizes must multiply to that number (-1: what is left)"
        )
    return Mesh(_lay_out(shape, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _lay_out(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices where neighbours in the mesh are neighbours in the network.

    `jax.make_mesh` does that for one slice, and of TPUs only where no axis of the torus is split.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    over_data = math.gcd(shape[0], slices)
    across = (over_data, slices // over_data, 1)
    if shape[1] % across[1]:
        raise UserError(
            f"config.mesh (data, fsdp, tensor) = {shape} does not fit {len(devices)} devices in "
            f"{slices} nodes or slices: data times fsdp must be a multiple of {slices}"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within = tuple(size // parts for size, parts in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def parameter_spec(mesh: Mesh, variable: nnx.Variable) -> PartitionSpec:
    """Mesh axes of each dimension of a parameter; one they do not divide stays whole."""
    names = variable.get_metadata().get("logical_axes") or (None,) * variable.get_value().ndim
    used: set[str] = set()
    spec = []
    for name, size in zip(names, variable.get_value().shape, strict=True):
        axis = RULES[name]
        fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
        spec.append(axis if fits else None)
        used.add(axis) if fits else None
    return PartitionSpec(*spec)


def parameter_shardings(mesh: Mesh, params: nnx.State) -> nnx.State:
    """The sharding of every parameter, in a tree like `params`."""
    return jax.tree.map(
        lambda v: v.replace(NamedSharding(mesh, parameter_spec(mesh, v))),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over their first dimension."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of each batch this process reads, of how many.

    Processes that lie along the tensor axis hold the same examples, so they read the same share.

    Raises:
      UserError: the devices of some processes overlap along the tensor axis without being the
        same; says what to change.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    groups: dict[frozenset[int], int] = {}
    for row in rows:
        group = frozenset(device.process_index for device in row)
        groups[group] = groups.get(group, 0) + 1
    ours = [i for i, group in enumerate(groups) if jax.process_index() in group]
    processes = sorted(process for group in groups for process in group)
    if processes != sorted(set(processes)) or len(set(groups.values())) > 1:
        raise UserError(
            f"config.mesh.tensor = {mesh.shape['tensor']} does not fit this job's processes: each "
            "row along the tensor axis must lie in one process, or fill whole processes"
        )
    return ours[0], len(groups)


T = TypeVar("T")


def place(batch: T, mesh: Mesh) -> T:
    """This host's share of a batch (`batch_share`) as global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
