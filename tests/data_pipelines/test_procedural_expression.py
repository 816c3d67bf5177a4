"""What each part of an expression code does to a procedural head, and what it leaves alone."""

import numpy as np
import pytest
from scipy.ndimage import label

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import EXPRESSION_PARTS, EXPRESSION_SIZE, expression_part, neutral_code
from data_pipelines.head_mesh import HeadShape
from data_pipelines.procedural import anatomy
from data_pipelines.procedural.expression import (
    BLENDSHAPES,
    deform,
    head_to_world,
)
from data_pipelines.procedural.features import EYE_RADIUS
from data_pipelines.procedural.figure import Figure
from data_pipelines.procedural.performance import perform
from data_pipelines.procedural.person import sample_person
from data_pipelines.procedural.renderer import render
from data_pipelines.procedural.skin import EYE_ROW, MOUTH_ROW

A = anatomy.anatomy()
SHAPE = HeadShape()


def posed(code: np.ndarray) -> np.ndarray:
    """Vertices of the average head under a code."""
    neutral = anatomy.neutral_vertices(SHAPE, 1.0, 1.0)
    return deform(neutral, anatomy.eye_centers(SHAPE), 1.0, 0.0, code)


def turned(part: str, axis: tuple[float, float, float], angle: float) -> np.ndarray:
    code = neutral_code()
    six = cameras.rotation_to_6d(cameras.axis_angle(np.array(axis), angle))
    code[expression_part(part)] = np.tile(six, EXPRESSION_PARTS[part] // 6)
    return code


def lips() -> tuple[int, int]:
    """Numbers of the vertices in the middle of the upper and the lower lip's edge."""
    edge = (A.v == MOUTH_ROW) & (np.abs(A.rest[:, 0]) < 1e-6)
    skin = np.flatnonzero(edge[A.skin] & (A.rest[A.skin, 2] > 0))
    assert len(skin) == 2
    return tuple(sorted(skin, key=lambda i: -A.side[i]))


def moved(code: np.ndarray) -> np.ndarray:
    """[V] how far a code takes each vertex from the neutral code's place, metres."""
    return np.linalg.norm(posed(code) - posed(neutral_code()), axis=-1)


def test_jaw_opens_by_turning_about_x():
    upper, lower = lips()
    closed, opened = posed(neutral_code()), posed(turned("jaw", (1, 0, 0), 0.4))
    np.testing.assert_allclose(closed[upper], closed[lower], atol=1e-6)
    gap = opened[upper] - opened[lower]
    assert 0.02 < gap[1] < 0.05
    np.testing.assert_allclose(opened[upper], closed[upper], atol=1e-6)
    # Teeth are rigid: the lower ones turn with the jaw, the upper ones with the skull.
    teeth = A.teeth[1]
    jaw = cameras.axis_angle(np.array([1, 0, 0]), 0.4)
    expected = (closed[teeth] - anatomy.JAW_JOINT) @ jaw.T + anatomy.JAW_JOINT
    np.testing.assert_allclose(opened[teeth], expected, atol=1e-6)
    np.testing.assert_allclose(opened[A.teeth[0]], closed[A.teeth[0]], atol=1e-6)


def test_jaw_leaves_forehead_eyes_and_shoulders():
    distance = moved(turned("jaw", (1, 0, 0), 0.4))
    still = (A.rest[:, 1] > 0.0) | (A.v > 0.9)
    for part in A.eyes:
        assert distance[part].max() < 1e-6
    assert distance[still].max() < 1e-6


def test_eyelids_close_each_eye_by_itself():
    edges = (A.v == EYE_ROW) & (np.abs(np.abs(A.rest[:, 0]) - 0.0315) < 0.002)
    edges[A.skin.stop :] = False
    edges &= A.rest[:, 2] > 0

    def openings(code: np.ndarray) -> tuple[float, float]:
        y = posed(code)[:, 1]
        left, right = edges & (A.rest[:, 0] > 0), edges & (A.rest[:, 0] < 0)
        return tuple(y[e & (A.side > 0)].max() - y[e & (A.side < 0)].min() for e in (left, right))

    code = neutral_code()
    assert min(openings(code)) > 0.007
    code[expression_part("eyelids")] = 1, 0
    left, right = openings(code)
    assert left < 0.001
    assert right > 0.007


def test_eyes_turn_about_their_centres():
    """A positive angle about y looks to the person's left."""
    straight, left = posed(neutral_code()), posed(turned("eyes", (0, 1, 0), 0.3))
    for part, center in zip(A.eyes, anatomy.eye_centers(SHAPE), strict=True):
        pupil = part.start
        assert left[pupil, 0] > straight[pupil, 0] + 0.003
        radius = np.linalg.norm(left[part] - center, axis=-1)
        np.testing.assert_allclose(radius, EYE_RADIUS, rtol=1e-4)
    outside = np.ones(len(A.v), bool)
    for part in A.eyes:
        outside[part] = False
    np.testing.assert_array_equal(left[outside], straight[outside])


@pytest.mark.parametrize("name", BLENDSHAPES)
def test_first_numbers_of_exp_move_the_face_alone(name):
    code = neutral_code()
    code[BLENDSHAPES.index(name)] = 1
    distance = moved(code)
    assert 0.002 < distance.max() < 0.02
    assert distance[(A.rest[:, 2] < -0.03) | (A.v > 0.85)].max() < 1e-6


def test_smile_raises_the_corners_of_the_mouth():
    code = neutral_code()
    code[BLENDSHAPES.index("smile")] = 1
    corner = np.argmin(np.linalg.norm(A.rest[A.skin] - A.rest[A.skin][_corner()], axis=-1))
    step = posed(code)[corner] - posed(neutral_code())[corner]
    assert step[0] > 0.003  # the left one, outward
    assert step[1] > 0.003


def _corner() -> int:
    ring = (A.v[A.skin] == MOUTH_ROW) & (A.rest[A.skin, 2] > 0)
    return int(np.argmin(np.where(ring, np.abs(A.rest[A.skin, 0] - 0.026), 1)))


def test_other_numbers_of_exp_move_nothing():
    code = neutral_code()
    code[len(BLENDSHAPES) : 100] = np.random.default_rng(0).standard_normal(100 - len(BLENDSHAPES))
    assert moved(code).max() == 0


def test_neck_turns_the_shoulders_under_the_head():
    code = turned("neck", (0, 1, 0), 0.3)
    distance = moved(code)
    assert distance[(A.rest[:, 1] > -0.07) & (A.v < 0.78)].max() < 1e-6
    shoulders = A.v > 0.95
    neutral, now = posed(neutral_code())[shoulders], posed(code)[shoulders]
    turn = cameras.axis_angle(np.array([0, 1, 0]), -0.3)
    expected = (neutral - anatomy.NECK_JOINT) @ turn.T + anatomy.NECK_JOINT
    np.testing.assert_allclose(now, expected, atol=1e-6)


def test_shoulders_follow_the_body_whatever_the_neck_does():
    """In the world, the neck moves the head and not the shoulders."""
    code = turned("neck", (0.2, 1, 0.1), 0.3)
    shoulders = posed(code)[A.v > 0.95].astype(np.float64)
    pose = head_to_world(code)
    np.testing.assert_allclose(
        shoulders @ pose[:3, :3].T + pose[:3, 3], posed(neutral_code())[A.v > 0.95], atol=1e-5
    )


def test_head_pose_is_rigid_and_leaves_the_mesh():
    code = turned("R", (0, 1, 0), 0.5)
    code[expression_part("t")] = 0.01, 0.02, 0.03
    assert moved(code).max() == 0
    pose = head_to_world(code)
    np.testing.assert_allclose(
        pose[:3, :3], cameras.axis_angle(np.array([0, 1, 0]), 0.5), atol=1e-6
    )
    np.testing.assert_allclose(pose[:3, 3], [0.01, 0.02, 0.03], atol=1e-6)


@pytest.mark.usefixtures("any_types")
def test_code_of_another_length_is_refused():
    with pytest.raises(UserError, match="135 numbers"):
        posed(np.zeros(134))


def test_performances_cover_what_a_code_can_say():
    codes = perform(np.random.default_rng(0), 200, turn=1.0)
    assert codes.shape == (200, EXPRESSION_SIZE)

    def angles(part: str, axis: int) -> np.ndarray:
        R = cameras.rotation_from_6d(codes[:, expression_part(part)][:, :6])
        i, j = (axis + 2) % 3, (axis + 1) % 3
        return np.degrees(np.arctan2(R[:, i, j] - R[:, j, i], R[:, i, i] + R[:, j, j]))

    assert angles("jaw", 0).max() > 15
    assert angles("jaw", 0).min() < 3
    assert np.ptp(angles("R", 1)) > 40
    assert np.ptp(angles("eyes", 1)) > 30
    blinks = codes[:, expression_part("eyelids")].max(-1) > 0.6
    assert 0.05 < blinks.mean() < 0.3
    assert codes[:, : len(BLENDSHAPES)].std(0).min() > 0.2


@pytest.mark.parametrize("seed", range(3))
def test_faces_have_no_cracks(seed):
    """Whatever the face does, the background never shows through it."""
    rng = np.random.default_rng([seed, 9])
    person = sample_person(rng)
    while person.hair.style not in ("bald", "buzz", "receding"):  # hair may leave gaps
        person = sample_person(rng)
    figure = Figure(person, 32)
    K = np.array([[3.05, 0, 0.5], [0, 3.05, 0.5], [0, 0, 1]])
    size = 160
    for i, code in enumerate(perform(rng, 6)):
        azimuth, elevation = 60 * i + rng.uniform(-30, 30), rng.uniform(-20, 30)
        camera = cameras.orbit(azimuth, elevation, 1.0, np.array([0, 0, -0.02]))
        _, mask = render(figure.scene(code), camera, K, size, np.zeros((size, size, 3)))
        _, pieces = label(np.pad(mask, ((1, 0), (1, 1))) < 255, structure=np.ones((3, 3)))
        assert pieces == 1
