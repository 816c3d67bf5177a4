"""The encoder's inputs: viewing rays, embedded points, DINOv2's map."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
from flax import nnx
from small_model import encode, inputs, rule_model, small_config, small_template

from flexavatar_jax.model.encoder import Queries, embed_points, plucker_map

rays_of = jax.jit(plucker_map, static_argnums=(2, 3))


def test_rays_by_definition():
    data = inputs()
    found = rays_of(jnp.array(data["cam2head"]), jnp.array(data["K"]), 5, 7)
    expected = numpy_reference.plucker(data["cam2head"][0], data["K"][0], 5, 7)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_rays_do_not_shift_by_half_a_pixel():
    """The corner pixels look along the image's corners: K's principal point 0 is the first one."""
    K = jnp.array([[[1.0, 0, 0], [0, 1.0, 1.0], [0, 0, 1]]])
    rays = rays_of(jnp.eye(4)[None], K, 4, 4)[0, ..., 3:]
    np.testing.assert_allclose(rays[3, 0], [0, 0, 1], atol=1e-7)
    np.testing.assert_allclose(rays[3, 3], np.array([1, 0, 1]) / np.sqrt(2), atol=1e-7)


def test_a_rays_moment_is_origin_times_direction():
    pose = np.eye(4, dtype=np.float32)
    pose[:3, 3] = [1, 0, 0]
    K = jnp.array([[[1.0, 0, 0.0], [0, 1.0, 0.0], [0, 0, 1]]])
    first = rays_of(jnp.array(pose)[None], K, 2, 2)[0, 0, 0]
    np.testing.assert_allclose(first, [0, -1, 0, 0, 0, 1], atol=1e-7)


def test_points_are_embedded_axis_by_axis():
    embedded = embed_points(np.array([[0.5, 0.25, 0.0]], np.float32))[0]
    assert embedded.shape == (51,)
    # x = 1/2: sin(pi/2), then sin of multiples of pi; y = 1/4: sin(pi/4), sin(pi/2), ...
    np.testing.assert_allclose(embedded[:3], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(embedded[8:11], [np.sqrt(0.5), 1, 0], atol=1e-6)
    np.testing.assert_allclose(embedded[16:24], 0, atol=1e-6)
    np.testing.assert_allclose(embedded[24:27], [0, -1, 1], atol=1e-6)
    np.testing.assert_allclose(embedded[40:48], 1, atol=1e-6)
    np.testing.assert_allclose(embedded[48:], [0.5, 0.25, 0])


def test_folded_queries_are_the_queries():
    queries = Queries(small_config(), small_template(), rngs=nnx.Rngs(0))
    folded = queries.folded()
    np.testing.assert_array_equal(folded(), queries())
    assert not nnx.to_flat_state(nnx.state(folded, nnx.Param))


def test_features_and_camera_reach_the_code():
    model, _ = rule_model("public")
    data = inputs()
    del data["expression"]
    code = encode(model, **data)
    assert np.abs(code - encode(model, **data | {"features": 0 * data["features"]})).max() > 1e-3
    elsewhere = data["cam2head"] + np.float32(0.1) * np.eye(4, k=3, dtype=np.float32)
    assert np.abs(code - encode(model, **data | {"cam2head": elsewhere})).max() > 1e-3
