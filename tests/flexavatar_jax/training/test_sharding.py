"""The mesh, and where parameters live on it."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from flexavatar_jax.training.sharding import batch_share, make_mesh, parameter_spec

# Stand-ins for meshes and devices that are not here.
pytestmark = pytest.mark.usefixtures("any_types")


class FakeMesh:
    """A mesh's shape is all that laying out a parameter needs."""

    shape = {"data": 2, "fsdp": 4, "tensor": 2}  # noqa: RUF012


def parameter(shape, axes):
    return nnx.Param(np.zeros(shape, np.float32), logical_axes=axes)


def test_minus_one_takes_the_devices_that_are_left():
    assert make_mesh(devices=jax.devices()[:1]).shape == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=0)])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(ValueError, match=r"config\.mesh"):
        make_mesh(devices=jax.devices()[:1], **sizes)


@dataclasses.dataclass(frozen=True)
class GPU:
    """A device as JAX shows those of several GPU nodes: each node is a slice."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"


def gpu_nodes(nodes, gpus):
    return [GPU(i, i // gpus) for i in range(nodes * gpus)]


@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [
        (dict(), {"data"}),
        (dict(data=4, fsdp=4), {"data"}),
        (dict(data=1, fsdp=16), {"fsdp"}),
        (dict(data=1, fsdp=2, tensor=8), {"fsdp"}),
    ],
)
def test_one_axis_crosses_nodes_and_the_tensor_axis_never(sizes, crossing):
    mesh = make_mesh(devices=gpu_nodes(2, 8), **sizes)
    node = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    axes = zip(mesh.axis_names, range(3), strict=True)
    assert {name for name, axis in axes if np.ptp(node, axis=axis).any()} == crossing
    assert len({device.id for device in mesh.devices.flat}) == 16


def test_a_tensor_axis_across_nodes_is_refused():
    with pytest.raises(ValueError, match="16 devices in 2 nodes or slices: data times fsdp must"):
        make_mesh(data=1, tensor=16, devices=gpu_nodes(2, 8))


def test_wide_dimensions_go_to_tensor_and_embeddings_to_fsdp():
    assert parameter_spec(FakeMesh, parameter((8, 6), ("embed", "mlp"))) == P("fsdp", "tensor")


def test_a_dimension_that_does_not_divide_stays_whole():
    assert parameter_spec(FakeMesh, parameter((6, 3), ("embed", "mlp"))) == P(None, None)


def test_an_axis_is_used_once():
    assert parameter_spec(FakeMesh, parameter((8, 8), ("embed", "embed"))) == P("fsdp", None)


def test_a_parameter_without_names_is_on_every_device():
    assert parameter_spec(FakeMesh, nnx.Param(np.zeros((8, 8)))) == P(None, None)


def mesh_of_processes(processes, tensor):
    """Devices that belong to `processes`, in the order of the mesh."""
    devices = np.array([SimpleNamespace(process_index=p) for p in processes])
    return SimpleNamespace(devices=devices, shape={"tensor": tensor})


@pytest.mark.parametrize(
    ("processes", "tensor", "share"),
    [
        ([0, 0, 1, 1], 1, (1, 2)),
        ([0, 0, 1, 1], 2, (1, 2)),
        ([0, 0, 1, 1], 4, (0, 1)),
        ([2, 2, 3, 3, 0, 0, 1, 1], 4, (1, 2)),
    ],
)
def test_processes_along_the_tensor_axis_read_the_same_share(monkeypatch, processes, tensor, share):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert batch_share(mesh_of_processes(processes, tensor)) == share


def test_a_tensor_axis_across_parts_of_processes_is_refused():
    with pytest.raises(ValueError, match=r"config\.mesh\.tensor = 3 does not fit"):
        batch_share(mesh_of_processes([0, 0, 1, 1, 2, 2], 3))
