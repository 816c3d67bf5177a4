"""The head template: which texel shows which point, and where Gaussians sit."""

import dataclasses

import numpy as np
import pytest
from numpy_reference import uv_position_map

from flexavatar_jax.model.head_template import HeadTemplate, rasterize_uv
from flexavatar_jax.runs.templates import load_template, parse_obj

SQUARE = """
v 0 0 0
v 1 0 0
v 1 1 5
v 0 1 5
vt 0 0
vt 1 0
vt 1 1
vt 0 1
f 1/1 2/2 3/3
f 1/1 3/3 4/4
"""


def test_a_texel_shows_the_point_at_its_centre_with_v_not_flipped():
    positions, covered = rasterize_uv(parse_obj(SQUARE, "square"), 8)
    assert covered.all()
    centres = (np.arange(8) + 0.5) / 8
    u, v = np.meshgrid(centres, centres)
    np.testing.assert_allclose(positions, np.stack([u, v, 5 * v], -1), atol=1e-12)


def test_the_first_face_of_several_wins_and_uncovered_texels_are_zero():
    left = [[0.0, 0.0], [0.6, 0.0], [0.6, 1.0], [0.0, 1.0]]
    faces = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    # A square over the left 0.6 of the map, and a second one over the whole lower half.
    uvs = np.array([*left, [0.0, 0.5], [0.8, 0.5], [0.8, 1.0], [0.0, 1.0]])
    vertices = np.repeat([[1.0, 1, 1], [2.0, 2, 2]], 4, axis=0)
    first = rasterize_uv(HeadTemplate(vertices, uvs, faces, faces), 10)
    last = rasterize_uv(HeadTemplate(vertices, uvs, faces[::-1], faces[::-1]), 10)
    np.testing.assert_allclose(first.positions[7, [2, 7, 9]], [[1] * 3, [2] * 3, [0] * 3])
    np.testing.assert_allclose(last.positions[7, [2, 7, 9]], [[2] * 3, [2] * 3, [0] * 3])
    assert first.covered[7].tolist() == [True] * 8 + [False] * 2
    assert first.covered[2].tolist() == [True] * 6 + [False] * 4


def test_overlapping_random_triangles_are_rasterised_by_definition():
    rng = np.random.default_rng(0)
    uvs = rng.uniform(-0.2, 1.2, (30, 2))
    # Corners on texel centres and edges through them: inclusion must be exact.
    uvs[::2] = (rng.integers(0, 12, (15, 2)) + 0.5) / 12
    faces = rng.integers(0, 30, (25, 3))
    faces[3] = [4, 4, 5]  # no area
    mesh = HeadTemplate(rng.standard_normal((30, 3)), uvs, faces, faces)
    # The same triangles, so scaled that both codes compute without rounding where it matters.
    positions, covered = rasterize_uv(mesh, 12)
    expected, expected_covered = uv_position_map(
        mesh.vertices, mesh.uvs, mesh.faces, mesh.face_uvs, 12
    )
    decided = ~on_an_edge(mesh, 12)
    assert decided.mean() > 0.5
    np.testing.assert_array_equal(covered[decided], expected_covered[decided])
    np.testing.assert_allclose(positions[decided], expected[decided], atol=1e-9)


def on_an_edge(mesh, resolution):
    """Texels whose centre lies so near an edge that rounding decides."""
    corners = mesh.uvs[mesh.face_uvs] * resolution - 0.5
    texels = np.stack(np.meshgrid(*[np.arange(resolution)] * 2), -1)[:, :, None]
    near = np.zeros((resolution, resolution), bool)
    for k in range(3):
        a, b = corners[:, k], corners[:, (k + 1) % 3]
        d = b - a
        t = np.clip(np.sum((texels - a) * d, -1) / np.maximum(np.sum(d * d, -1), 1e-9), 0, 1)
        near |= (np.linalg.norm(texels - a - t[..., None] * d, axis=-1) < 1e-9).any(-1)
    return near


def test_edges_and_corners_belong_to_a_face():
    """Texel centres exactly on an edge, in coordinates that binary numbers hold exactly."""
    uvs = np.array([[1, 1], [7, 1], [1, 7]]) / 8  # centres of a 4 x 4 map: 1/8, 3/8, 5/8, 7/8
    faces = np.array([[0, 1, 2]])
    covered = rasterize_uv(HeadTemplate(np.eye(3), uvs, faces, faces), 4).covered
    assert covered.tolist() == [[x + y <= 3 for x in range(4)] for y in range(4)]


def test_sample_points_are_row_major_and_on_the_surface():
    template = parse_obj(SQUARE, "square")
    points = template.sample_points(8, 6)
    # The outermost points of the grid lie on the map's edge and mix with the uncovered outside.
    inner = [row * 6 + column for row in range(1, 5) for column in range(1, 5)]
    assert points.index.tolist() == inner
    at = (np.linspace(-1, 1, 6) + 1) / 2
    expected = [(at[i % 6], at[i // 6], 5 * at[i // 6]) for i in inner]
    np.testing.assert_allclose(points.positions, expected, atol=1e-6)


def test_the_published_template_has_58361_points(shared_dir):
    template = load_template(shared_dir / "flex1" / "gghead_template.obj")
    assert len(template.sample_points(256, 256).index) == 58361


def test_the_projects_own_head_fills_its_map():
    template = load_template()
    assert template.position_map(32).covered.all()
    points = template.sample_points(64, 64)
    assert len(points.index) == 62 * 62
    assert np.abs(points.positions).max() < 0.25


def test_uvs_beyond_the_unit_square_are_named():
    mesh = parse_obj(SQUARE, "square")
    with pytest.raises(ValueError, match="unit square"):
        dataclasses.replace(mesh, uvs=mesh.uvs + 2).sample_points(8, 6)
