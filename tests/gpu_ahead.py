"""An H100 to compile for, which need not be here."""

import importlib.metadata

import jax
import jaxlib
import pytest
from jax.experimental import topologies

H100_CONFIG = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
"""
"""What XLA's compiler asks of a GPU, as an H100 answers."""


def h100():
    """JAX's device; skips where XLA's compiler for GPUs is not installed."""
    try:
        version = importlib.metadata.version("jax-cuda12-pjrt")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != jaxlib.__version__:
        package = f"jax-cuda12-pjrt=={jaxlib.__version__}"
        pytest.skip(f"XLA's compiler for GPUs is not here: pip install --no-deps {package}")
    jax.devices()  # finds the plugin
    (device,) = topologies.get_topology_desc(
        "h100", "cuda", target_config=H100_CONFIG, topology="1x1x1"
    ).devices
    return device
