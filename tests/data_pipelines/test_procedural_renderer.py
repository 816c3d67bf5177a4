"""The z-buffer renderer against geometry worked out by hand."""

import numpy as np
import pytest

from data_pipelines import cameras
from data_pipelines.procedural.renderer import Light, Scene, mip_levels, render

FLAT = Light(direction=np.array([0.0, 0, 1]), key=np.zeros(3), fill=np.full(3, 1 / 0.8))
"""Light that shows a surface whose normal is level (y = 0) in its texture's colours."""

K = np.array([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
FRONT = cameras.look_at(np.array([0.0, 0, 1]), np.zeros(3))
BLACK = np.zeros((32, 32, 3), np.float32)


def quad(x0, x1, y0, y1, z, color, two_sided=False) -> Scene:
    """An upright rectangle that faces +z, in one colour."""
    vertices = np.array([[x0, y0, z], [x1, y0, z], [x1, y1, z], [x0, y1, z]], np.float32)
    texture = np.zeros((8, 8, 4), np.float32)
    texture[..., :3] = color
    return Scene(
        vertices=vertices,
        normals=np.tile(np.array([0, 0, 1], np.float32), (4, 1)),
        uvs=np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32),
        faces=np.array([[0, 1, 2], [0, 2, 3]]),
        two_sided=np.full(2, two_sided),
        texture=mip_levels(texture),
        light=FLAT,
    )


def both(a: Scene, b: Scene) -> Scene:
    """Two scenes in one; the halves of the texture, left and right, are theirs."""
    return Scene(
        vertices=np.concatenate([a.vertices, b.vertices]),
        normals=np.concatenate([a.normals, b.normals]),
        uvs=np.concatenate([a.uvs * [0.25, 1], b.uvs * [0.25, 1] + [0.75, 0]]).astype(np.float32),
        faces=np.concatenate([a.faces, b.faces + len(a.vertices)]),
        two_sided=np.concatenate([a.two_sided, b.two_sided]),
        texture=(np.concatenate([a.texture[0], b.texture[0]], axis=1),),
        light=FLAT,
    )


def test_rectangle_lies_where_the_pinhole_puts_it():
    # Half a metre is half the picture at this focal length and distance.
    image, mask = render(quad(0, 0.25, 0, 0.25, 0, [1, 0, 0]), FRONT, K, 32, BLACK)
    expected = np.zeros((32, 32), np.uint8)
    expected[8:16, 16:24] = 255  # x to the right, y up
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(image[..., 0], expected)
    assert image[..., 1:].max() == 0


def test_edges_between_samples_are_half_covered():
    pixel = 1 / 32
    _, mask = render(quad(0, 4.5 * pixel, 0, 4 * pixel, 0, [1, 0, 0]), FRONT, K, 32, BLACK)
    row = mask[14]
    np.testing.assert_array_equal(row[16:20], 255)
    assert row[20] in (127, 128)
    np.testing.assert_array_equal(row[21:], 0)


def test_near_hides_far_whatever_the_order():
    near = quad(-0.1, 0.1, -0.1, 0.1, 0.2, [0, 1, 0])
    far = quad(-0.3, 0.3, -0.3, 0.3, 0.0, [1, 0, 0])
    for scene in (both(near, far), both(far, near)):
        image, _ = render(scene, FRONT, K, 32, BLACK)
        np.testing.assert_array_equal(image[16, 16], [0, 255, 0])
        np.testing.assert_array_equal(image[16, 8], [255, 0, 0])


def test_back_faces_are_drawn_only_where_asked():
    behind = cameras.look_at(np.array([0.0, 0, -1]), np.zeros(3))
    one = quad(-0.2, 0.2, -0.2, 0.2, 0, [1, 0, 0])
    two = quad(-0.2, 0.2, -0.2, 0.2, 0, [1, 0, 0], two_sided=True)
    assert render(one, behind, K, 32, BLACK)[1].max() == 0
    assert render(two, behind, K, 32, BLACK)[1].max() == 255


def test_triangles_that_share_an_edge_leave_no_gap():
    rng = np.random.default_rng(0)
    for _ in range(20):
        angle = rng.uniform(0, np.pi)
        spin = cameras.axis_angle(np.array([0, 0, 1.0]), angle)
        scene = quad(-2, 2, -2, 2, 0, [1, 1, 1])
        turned = np.asarray(scene.vertices @ spin.T, np.float32)
        scene = Scene(**{**vars(scene), "vertices": turned})
        assert render(scene, FRONT, K, 32, BLACK)[1].min() == 255


def test_texture_is_interpolated_in_perspective():
    """On a floor seen at a slant, the texture's middle is not half-way between its ends' rows."""
    scene = quad(-1, 1, -1, 1, 0, [0, 0, 0])
    floor = np.array([[-1, -0.3, 0.0], [1, -0.3, 0], [1, -0.3, -8], [-1, -0.3, -8]], np.float32)
    ramp = np.zeros((64, 64, 4), np.float32)
    ramp[..., 0] = ((np.arange(64) + 0.5) / 64)[:, None]
    scene = Scene(**{**vars(scene), "vertices": floor, "texture": (ramp,)})
    size = 64
    image, mask = render(scene, FRONT, K, size, np.zeros((size, size, 3), np.float32))
    rows = np.flatnonzero(mask[:, 32] == 255)[2:-2]
    # The ray through a row meets the floor at this depth; v is 1 at depth 1 and 0 at depth 9.
    depth = 0.3 / ((rows + 0.5) / size - 0.5)
    np.testing.assert_allclose(image[rows, 32, 0] / 255, (9 - depth) / 8, atol=0.02)


def test_background_shows_through_partly_covered_pixels():
    pixel = 1 / 32
    scene = quad(0, 4.5 * pixel, 0, 4 * pixel, 0, [1, 0, 0])
    image, _ = render(scene, FRONT, K, 32, np.full((32, 32, 3), [0, 0, 1], np.float32))
    np.testing.assert_array_equal(image[14, 17], [255, 0, 0])
    np.testing.assert_allclose(image[14, 20].astype(int), [128, 0, 128], atol=1)
    np.testing.assert_array_equal(image[14, 25], [0, 0, 255])


def test_light_falls_from_its_side():
    light = Light(direction=np.array([1.0, 0, 0]), key=np.ones(3), fill=np.zeros(3))
    scene = Scene(**{**vars(quad(-0.4, 0.4, -0.4, 0.4, 0, [0.5, 0.5, 0.5])), "light": light})
    normals = np.array([[-1, 0, 0.2], [1, 0, 0.2], [1, 0, 0.2], [-1, 0, 0.2]], np.float32)
    scene = Scene(**{**vars(scene), "normals": normals})
    row = render(scene, FRONT, K, 32, BLACK)[0][16, :, 0]
    assert row[26] > row[16] > 0
    assert row[26] > row[6]


def test_triangles_too_near_are_left_out():
    scene = quad(-0.2, 0.2, -0.2, 0.2, 0.99, [1, 0, 0])
    assert render(scene, FRONT, K, 32, BLACK)[1].max() == 0


@pytest.mark.parametrize("side", [48, 64])
def test_mip_levels_keep_the_mean(side):
    texture = np.random.default_rng(0).random((side, 2 * side, 4))
    levels = mip_levels(texture)
    assert len(levels) == 2
    for level in levels:
        np.testing.assert_allclose(level.mean((0, 1)), texture.mean((0, 1)), rtol=1e-5)
