"""Fixtures that every room's tests use."""

import functools
import os
from importlib import metadata
from pathlib import Path

import jaxtyping
import pytest
from packaging.version import Version

# libtpu is installed for its compiler; without this, JAX would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's emitters of whole fusions take three times as long to compile. `XLA_FLAGS= pytest ...` tests
# what they emit, as .ci/run does for the kernels; later JAX may have nothing else.
if Version(metadata.version("jaxlib")) < Version("0.11"):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Every test is a test of the signatures too, of shapes, dtypes and all other types; processes that
# tests start go without.
jaxtyping.install_import_hook(["flexavatar_jax", "kernels", "data_pipelines"], "signatures.check")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the published model's parity data and real tracked portraits."""
    root = Path(__file__).resolve().parents[1]
    for candidate in (os.environ.get("FLEXAVATAR_SHARED"), root.parent / "shared"):
        if candidate and (Path(candidate) / "flex1").is_dir():
            return Path(candidate)
    pytest.skip("parity data not found: set FLEXAVATAR_SHARED to the folder with flex1/ and real/")


@pytest.fixture
def any_types():
    """Signatures aren't checked: the code's own sentence on wrong arguments is what is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def h100():
    """An H100 to compile for, which need not be here."""
    import gpu_ahead

    return gpu_ahead.h100()


@pytest.fixture
def cudnn(monkeypatch):
    """As if cuDNN 9.10 and an H100 were here, as far as JAX asks."""
    from jax._src.cudnn import fused_attention_stablehlo

    patch = functools.partial(monkeypatch.setattr, fused_attention_stablehlo)
    patch("check_cudnn_version", lambda: 91000)
    patch("check_compute_capability", lambda least: float(least) <= 9.0)


@pytest.fixture(scope="session", autouse=True)
def _compile_each_program_once(tmp_path_factory):
    """Tests that train the same small model share its compiled programs, in all processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    cache = str(folder / "compiled")
    settings = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    os.environ |= settings
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module")
def quick_compilation():
    """The same arithmetic, compiled in half of the time: for tests that hardly compute.

    In the processes that they start, too.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)
