"""Faces are found by the camera, and cut out where networks expect their points."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.head_mesh import template_mesh
from data_pipelines.pixel3dmm import read_portrait
from flexavatar_jax.evaluation import face_crops
from flexavatar_jax.runs.templates import load_template

RNG = np.random.default_rng(0)


def test_a_similarity_is_found_exactly_where_there_is_one_and_by_least_squares_elsewhere():
    angle, scale, shift = 0.7, 1.8, np.array([20.0, -5.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    source = RNG.random((5, 2)) * 100
    found = face_crops.similarity(source, source @ turn.T + shift)
    np.testing.assert_allclose(found, np.c_[turn, shift], atol=1e-9)
    target = source @ turn.T + shift + RNG.standard_normal((5, 2))
    x, y = source.T
    one, zero = np.ones(5), np.zeros(5)
    equations = np.concatenate(
        [np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)]
    )  # in a, b, tx, ty of [[a, -b, tx], [b, a, ty]]
    a, b, tx, ty = np.linalg.lstsq(equations, target.T.ravel(), rcond=None)[0]
    found = face_crops.similarity(source, target)
    np.testing.assert_allclose(found, [[a, -b, tx], [b, a, ty]], atol=1e-9)
    np.testing.assert_allclose(
        face_crops.apply(face_crops.invert(found), face_crops.apply(found, source)), source
    )


def test_a_cut_is_what_pillow_makes_of_the_same_transform():
    image = RNG.random((40, 40, 3)).astype(np.float32)
    matrix = face_crops.similarity(np.array([(8.0, 9), (30, 12)]), np.array([(2.0, 3), (17, 4)]))
    found = face_crops.cut(image, matrix, 20)
    inverse = tuple(face_crops.invert(matrix).ravel())
    for c in range(3):
        channel = Image.fromarray(image[..., c])
        expected = channel.transform(
            (20, 20), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR
        )
        np.testing.assert_allclose(
            found[2:-2, 2:-2, c], np.asarray(expected)[2:-2, 2:-2], atol=1e-4
        )


def test_a_box_fills_the_square_and_beyond_the_picture_is_black():
    image = np.ones((10, 10, 3), np.float32)
    matrix = face_crops.box_to_square(np.array([-10.0, 0, 10, 10]), 40)
    found = face_crops.cut(image, matrix, 40)
    np.testing.assert_allclose(found[2:-2, 22:-2], 1)
    np.testing.assert_allclose(found[:, :18], 0)


def test_a_camera_before_the_face_has_it_upright_in_the_middle():
    cam2head = np.diag([1.0, -1.0, -1.0, 1.0])
    cam2head[2, 3] = 1.0
    K = np.array([[3.0, 0, 0.5], [0, 3.0, 0.5], [0, 0, 1]])
    right_eye, left_eye, nose, *mouth = face_crops.project(face_crops.FACE_POINTS, cam2head, K, 100)
    assert nose[0] == pytest.approx(50)
    assert right_eye[0] < 50 < left_eye[0]
    assert right_eye[1] == pytest.approx(50 - 100 * 3 * 0.022 / (1 - 0.038))
    assert right_eye[1] < nose[1] < mouth[0][1]
    left, top, right, bottom = face_crops.face_box(cam2head, K, 100)
    assert left == pytest.approx(29)
    assert right == pytest.approx(71)
    assert top < right_eye[1]
    assert bottom > mouth[0][1]


def surface_depth(mesh, x, y):
    """z of the foremost point of a mesh at (x, y)."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    p = np.array([x, y])
    corners = np.stack([a[:, :2] - p, b[:, :2] - p, c[:, :2] - p], axis=1)
    areas = np.stack([np.linalg.det(corners[:, [j, k]]) for j, k in ((1, 2), (2, 0), (0, 1))], 1)
    total = areas.sum(1)
    hit = ((areas * np.sign(total)[:, None] >= 0).all(1)) & (total != 0)
    depths = np.stack([a[:, 2], b[:, 2], c[:, 2]], axis=1)
    return ((areas[hit] / total[hit, None]) * depths[hit]).sum(1).max()


def test_the_points_lie_on_the_projects_own_head():
    for x, y, z in face_crops.FACE_POINTS:
        assert surface_depth(template_mesh(), x, y) == pytest.approx(z, abs=0.006)


def test_the_points_lie_on_the_published_template(shared_dir):
    template = load_template(shared_dir / "flex1" / "gghead_template.obj")
    for x, y, z in face_crops.FACE_POINTS:
        assert surface_depth(template, x, y) == pytest.approx(z, abs=0.006)


@pytest.mark.parametrize("name", ["marble_sculpture", "asian_watercolor_girl"])
def test_the_points_lie_where_a_detector_finds_them_on_real_portraits(shared_dir, name):
    """PIPNet's landmarks of the tracker's crop; its pupils, nose's tip and corners of the mouth."""
    portrait = read_portrait(shared_dir / "real", name)
    file = shared_dir / "real" / "processing" / name / "PIPnet_landmarks" / "00000.npy"
    detected = 512 * (np.load(file) + 0.1) / 1.2  # in the widened crop
    five = detected[[96, 97, 54, 76, 82]]
    seen = face_crops.project(face_crops.FACE_POINTS, portrait.cam2head, portrait.K, 512)
    assert np.linalg.norm(five[0] - five[1]) > 100
    assert np.linalg.norm(seen - five, axis=1).max() < 15
    left, top, right, bottom = face_crops.face_box(portrait.cam2head, portrait.K, 512)
    low, high = detected.min(0), detected.max(0)
    assert [left, right, bottom] == pytest.approx([low[0], high[0], high[1]], abs=10)
    assert low[1] - 60 < top < low[1]  # keypoints begin at the brows
