"""The backends that need other hardware, emulated, on an avatar of 58,361 Gaussians."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_pallas_gpu import INTERPRETED

from kernels import cuda, oracle, pallas_gpu, pallas_tpu, rasterize, rasterizer, xla
from kernels.bench import scenes
from kernels.cuda import build

BACKGROUND = np.float32([0.1, 0.2, 0.3])


@contextlib.contextmanager
def emulated(name):
    """The backend, in a form that runs on a CPU."""
    if name == "cuda":
        try:
            cuda.backend.register(build.build(emulation=True), "cpu")
        except build.BuildError as error:
            pytest.skip(f"the CUDA kernels' emulation can't be built: {error}")
        yield cuda.BACKEND
    elif name == "pallas_gpu":
        if pallas_gpu.triton is None:
            pytest.skip(pallas_gpu.BACKEND.unavailable())
        yield INTERPRETED
    else:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
            yield pallas_tpu.BACKEND


def gradients(backend, inputs, weights, settings):
    """Gradients of sum(weights * outputs) by every input, and the outputs."""

    def loss(inputs):
        *scene, background = inputs
        out = rasterize(*scene, background=background, **settings)
        return sum(jnp.sum(w * a) for w, a in zip(weights, out[:3], strict=True)), out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rasterizer, "choose_backend", lambda name: backend)
        return jax.block_until_ready(jax.jit(jax.grad(loss, has_aux=True))(inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "corner", "size", "capacity"),
    [
        ("cuda", (0, 0), (512, 512), 600_000),
        # Interpreters are slow: a window on the head's edge, some of it empty, some opaque.
        ("pallas_gpu", (100, 220), (64, 48), 100_000),
        ("pallas_tpu", (100, 220), (64, 48), 100_000),
    ],
)
def test_an_avatar_is_the_oracles_and_its_gradients_those_of_xla(name, corner, size, capacity):
    size = dict(zip(("width", "height"), size, strict=True))
    avatar = scenes.avatar()
    avatar.Ks[:, :2, 2] -= corner
    inputs = (*avatar, BACKGROUND)
    image = (1, size["height"], size["width"])
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((*image, 3), image, image)]
    with emulated(name) as backend:
        found, out = gradients(backend, inputs, weights, {**size, "capacity": capacity})
    expected, _ = gradients(xla.BACKEND, inputs, weights, {**size, "capacity": capacity})
    reference = oracle.render(*(a[0] for a in avatar), background=BACKGROUND, **size)

    assert int(out.overflow[0]) == 0
    assert 0.1 < np.mean(reference.alpha < 0.01) < np.mean(reference.alpha < 0.99) < 0.9
    for field in ("color", "alpha", "depth"):
        errors = np.abs(np.asarray(getattr(out, field)[0]) - getattr(reference, field))
        assert errors.mean() < 2e-5, field
        assert errors[~reference.fragile].max() < 5e-3, field
    for field, a, b in zip((*avatar._fields, "background"), found, expected, strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), field
