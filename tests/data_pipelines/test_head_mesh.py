"""The neutral head: a closed, smooth, human-sized surface whose UV map fills the unit square."""

import numpy as np
import pytest

from data_pipelines import head_mesh


@pytest.fixture(scope="module")
def mesh() -> head_mesh.Mesh:
    return head_mesh.template_mesh()


def test_is_as_large_as_a_head(mesh):
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    assert 3000 < len(mesh.vertices) < 10000
    head = mesh.vertices[mesh.vertices[:, 1] > -0.08]
    assert 0.16 < np.ptp(head[:, 0]) < 0.20  # with ears
    assert 0.12 < high[1] < 0.14
    assert low[1] < -0.15
    assert 0.07 < high[2] < 0.09  # the tip of the nose
    nose = mesh.vertices[mesh.vertices[:, 2].argmax()]
    np.testing.assert_allclose(nose[:2], [0, -0.009], atol=0.004)


def test_left_is_the_mirror_of_right():
    u, v = np.meshgrid(np.linspace(0, 1, 41), np.linspace(0, 1, 31))
    left, right = head_mesh.head_surface(u, v), head_mesh.head_surface(1 - u, v)
    np.testing.assert_allclose(left, right * [-1, 1, 1], atol=1e-12)


def test_closes_at_the_seam_and_on_the_crown():
    t = np.linspace(0, 1, 50)
    surface = head_mesh.head_surface
    np.testing.assert_allclose(surface(0 * t, t), surface(0 * t + 1, t), atol=1e-12)
    np.testing.assert_allclose(surface(t, 0 * t), surface(1 - t, 0 * t), atol=1e-12)


def test_the_only_border_is_the_end_of_the_neck(mesh):
    edges = np.concatenate([mesh.faces[:, [i, (i + 1) % 3]] for i in range(3)])
    undirected, count = np.unique(np.sort(edges, axis=-1), axis=0, return_counts=True)
    assert count.max() == 2
    rim = mesh.vertices[undirected[count == 1].ravel()]
    on_crown = np.abs(rim[:, 0]) < 1e-9  # the fold, closed in space
    assert np.all(on_crown | (rim[:, 1] < -0.15))


def test_faces_look_outward(mesh):
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    normal = np.cross(b - a, c - a)
    head = ((a + b + c) / 3)[:, 1] > -0.06
    outward = (a + b + c) / 3 - [0, 0.02, -0.03]
    assert np.mean(np.sum(normal * outward, -1)[head] > 0) > 0.99


def test_texture_fills_the_unit_square_without_overlap(mesh):
    a, b, c = np.moveaxis(mesh.uvs[mesh.face_uvs], 1, 0)
    (e, f), (g, h) = (b - a).T, (c - a).T
    area = (e * h - f * g) / 2
    assert np.all(area < 0) or np.all(area > 0)
    np.testing.assert_allclose(np.abs(area.sum()), 1)
    assert mesh.uvs.min() == 0
    assert mesh.uvs.max() == 1


def test_face_is_upright_and_larger_than_the_back_in_the_map(mesh):
    surface = head_mesh.head_surface
    forehead, nose, chin = (surface(np.array(0.5), np.array(v)) for v in (0.3, 0.55, 0.75))
    assert forehead[1] > nose[1] > chin[1]
    assert surface(np.array(0.6), np.array(0.5))[0] > 0  # the person's left

    def share(u: float) -> float:
        """Share of the map's width, over share of the head's girth, of a strip at eye level."""
        ends = surface(np.array([u - 0.01, u + 0.01]), np.array([0.45, 0.45]))
        return 0.02 / np.linalg.norm(ends[1] - ends[0])

    assert 1.2 < share(0.5) / share(0.0) < 3


def test_the_texture_has_more_room_for_the_face_than_for_the_back():
    def texel(u: float, v: float) -> tuple[float, float]:
        """Metres across and down the head that a 48th of the texture takes there."""
        places = np.array([[u, u + 1e-4, u], [v, v, v + 1e-4]])
        point = head_mesh.head_surface(*places)
        texture = head_mesh.texture_coordinates(*places)
        metres, share = (np.linalg.norm(x[1:] - x[0], axis=-1) for x in (point, texture))
        return tuple(metres / share / 48)

    across, down = texel(0.56, 0.45)  # at the left eye, whose opening is 29 x 9 mm
    assert across < 0.029 / 4
    assert down < 0.009 / 1.7
    assert max(texel(0.0, 0.45)) < 0.025  # hair's locks are wider than that


def test_neighbouring_texels_are_neighbours_on_the_head():
    r = 64
    centres = (np.arange(r) + 0.5) / r
    points = head_mesh.head_surface(*np.meshgrid(centres, centres))
    for axis in (0, 1):
        assert np.linalg.norm(np.diff(points, axis=axis), axis=-1).max() < 0.025


def test_shape_parameters_change_what_they_name():
    v = np.linspace(0, 1, 200)
    u = np.full_like(v, 0.5)
    mean = head_mesh.head_surface(u, v)
    long_nose = head_mesh.head_surface(u, v, head_mesh.HeadShape(nose_length=1.3))
    assert long_nose[:, 2].max() > mean[:, 2].max() + 0.005
    tall = head_mesh.head_surface(u, v, head_mesh.HeadShape(height=1.1))
    np.testing.assert_allclose(tall[:, 1].max(), 1.1 * mean[:, 1].max())
