"""SAM's image encoder lays its tokens out for TPUs as their kernels want them: nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest
from frozen_blocks import error, stack, with_gradient

from flexavatar_jax.frozen import hiera
from flexavatar_jax.frozen.hiera_blocks import Block, in_windows
from kernels import backends


def test_wide_windows_hold_what_others_do(on_tpu):
    """Of a map that they don't divide, through layers that see what fills it up."""
    kind, p = Block(96, 96, 1, 14, pool=False), stack(96, 96, layers=3)
    x = jnp.float32(np.random.default_rng(0).standard_normal((2, 20, 20, 96)))
    found = with_gradient(lambda x: hiera._in_wide_windows(kind, p, range(1, 3), x), x)
    with backends.compiling_for("cpu"):
        expected = with_gradient(lambda x: in_windows([kind], [(p, range(1, 3))], x), x)
    assert error(found[0], expected[0]) < 1e-5
    assert error(found[1], expected[1]) < 3e-5


@pytest.mark.slow
def test_the_stem_is_the_same_in_its_own_order(on_tpu):
    """Where two tokens are nearly alike, pooling may choose either: of the six million maxima some
    dozens do, and gradients in their windows, of 64 tokens each, differ."""
    params = hiera.fold(
        {
            name: np.float32(np.random.default_rng(i).standard_normal(shape) * 0.1)
            for i, (name, shape) in enumerate(hiera.shapes().items())
        }
    )
    x = jnp.float32(np.random.default_rng(0).standard_normal((1, 256, 256, 96)))
    found = with_gradient(lambda x: hiera._stem(params["stem"], x), x)
    with backends.compiling_for("cpu"):
        expected = with_gradient(lambda x: hiera._stem(params["stem"], x), x)
    assert error(found[0], expected[0]) < 2e-5
    off = np.linalg.norm(found[1] - expected[1], axis=-1)
    assert np.quantile(off / np.linalg.norm(expected[1], axis=-1), 0.9) < 1e-4
