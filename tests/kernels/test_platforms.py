"""Commands look for no TPU where there is none, and leave alone whatever may be one's host."""

import importlib

import jax
import pytest

from kernels import platforms


@pytest.fixture
def nothing_here(monkeypatch):
    """A machine with libtpu and no accelerator, on which nobody has chosen; yields the patches."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(platforms, "Path", NoDevices)
    for name in platforms._OF_TPU_HOSTS:
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield monkeypatch
    jax.config.update("jax_platforms", before)


class NoDevices:
    found = ()

    def __init__(self, folder):
        self.folder = folder

    def glob(self, pattern):
        return [name for name in self.found if name.startswith(self.folder)]


def chosen():
    platforms.look_for_no_absent_tpu()
    return jax.config.jax_platforms


def test_without_any_accelerator_jax_looks_for_cpus_alone(nothing_here):
    assert chosen() == "cpu"


def test_without_libtpu_jax_chooses(nothing_here):
    nothing_here.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen() is None


@pytest.mark.parametrize("device", ["/dev/accel0", "/dev/vfio/0"])
def test_a_tpus_host_is_left_to_jax(nothing_here, device):
    nothing_here.setattr(NoDevices, "found", (device,))
    assert chosen() is None


@pytest.mark.parametrize("name", ["TPU_NAME", "TPU_WORKER_HOSTNAMES"])
def test_a_job_with_tpus_is_left_to_jax(nothing_here, name):
    nothing_here.setenv(name, "here")
    assert chosen() is None


def test_other_plugins_and_choices_of_ones_own_are_left_alone(nothing_here):
    nothing_here.setattr(importlib.metadata, "entry_points", lambda group: ["xla_cuda12"])
    assert chosen() is None
    jax.config.update("jax_platforms", "tpu,cpu")
    assert chosen() == "tpu,cpu"
