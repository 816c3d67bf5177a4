"""Procedural data sets: who is in them, from where they are seen, and that seeds decide it all."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import MONOCULAR, MULTI_VIEW, expression_part
from data_pipelines.procedural.capture_sets import INPUT_CAMERA, ProceduralSet, procedural_sets
from data_pipelines.procedural.expression import head_to_world

SMALL = {
    "size": 48,
    "seed": 5,
    "monocular_people": 3,
    "multiview_people": 2,
    "test_people": 2,
    "monocular_timesteps": 6,
    "multiview_timesteps": 2,
    "test_timesteps": 2,
    "num_cameras": 8,
}


@pytest.fixture(scope="module")
def sets() -> dict[str, ProceduralSet]:
    return {s.name: s for s in procedural_sets(**SMALL)}


@pytest.fixture(scope="module")
def clips(sets) -> dict[str, list]:
    return {name: list(s.clip(1)) for name, s in sets.items()}


def azimuth(frame) -> float:
    """Degrees round the head at which the frame's camera stands; 0 is in front."""
    x, _, z = frame.cam2head[:3, 3]
    return float(np.degrees(np.arctan2(x, z)))


def test_clips_have_the_frames_they_announce(sets, clips):
    for name, frames in clips.items():
        assert len(frames) == sets[name].frames_per_clip
        assert len({(f.timestep, f.camera) for f in frames}) == len(frames)
        for f in frames:
            assert f.image.shape == (48, 48, 3)
            assert f.mask.shape == (48, 48)
            assert f.image.dtype == f.mask.dtype == np.uint8
            assert f.cam2head.dtype == f.K.dtype == f.expression.dtype == np.float32
            assert f.expression.shape == (135,)
            assert 0.2 < f.mask.mean() / 255 < 0.8
            assert 0.9 < np.linalg.norm(f.cam2head[:3, 3]) < 1.2
            np.testing.assert_allclose(
                f.cam2head[:3, :3] @ f.cam2head[:3, :3].T, np.eye(3), atol=1e-5
            )


def test_sources(clips):
    assert {f.source for f in clips["procedural_monocular"]} == {MONOCULAR}
    assert {f.source for f in clips["procedural_multiview"]} == {MULTI_VIEW}
    assert {f.source for f in clips["procedural_test"]} == {MULTI_VIEW}


def test_multiview_cameras_stand_all_round_at_different_heights(clips):
    moment = [f for f in clips["procedural_multiview"] if f.timestep == 0]
    around = np.sort([azimuth(f) % 360 for f in moment])
    gaps = np.diff(np.append(around, around[0] + 360))
    assert gaps.max() < 80
    assert np.ptp([f.cam2head[1, 3] for f in moment]) > 0.3


def test_test_people_have_an_input_camera_in_front(clips):
    frames = [f for f in clips["procedural_test"] if f.camera == INPUT_CAMERA]
    assert len(frames) == SMALL["test_timesteps"]
    assert all(abs(azimuth(f)) < 40 for f in frames)


def test_monocular_camera_is_still_and_its_place_leaks_through_the_code(clips):
    """The camera circles the head only because the head turns, and the code says how far."""
    frames = clips["procedural_monocular"]
    cam2world = [head_to_world(f.expression) @ f.cam2head for f in frames]
    np.testing.assert_allclose(cam2world, np.broadcast_to(cam2world[0], (6, 4, 4)), atol=1e-5)
    assert np.ptp([azimuth(f) for f in frames]) > 5


def test_a_tracker_may_report_a_part_of_the_turn_in_code_and_camera_alike(clips):
    halved = procedural_sets(**SMALL, reported_turn=0.5)
    frames = list(halved[0].clip(1))
    for f, true in zip(frames, clips["procedural_monocular"], strict=True):
        np.testing.assert_array_equal(f.image, true.image)
        turns = [
            Rotation.from_matrix(cameras.rotation_from_6d(g.expression[expression_part("R")]))
            for g in (f, true)
        ]
        np.testing.assert_allclose(turns[0].as_rotvec(), 0.5 * turns[1].as_rotvec(), atol=1e-6)
        np.testing.assert_allclose(
            head_to_world(f.expression) @ f.cam2head,
            head_to_world(true.expression) @ true.cam2head,
            atol=1e-5,
        )
    for part in halved[1:]:
        for f, true in zip(part.clip(1), clips[part.name], strict=True):
            np.testing.assert_array_equal(f.expression, true.expression)


def test_a_tracker_may_take_heads_for_larger_and_farther(clips):
    for sort in procedural_sets(**SMALL, reported_size=1.1):
        factor = 1.1 if sort.name == "procedural_monocular" else 1
        for f, true in zip(sort.clip(1), clips[sort.name], strict=True):
            np.testing.assert_array_equal(f.image, true.image)
            np.testing.assert_array_equal(f.expression, true.expression)
            np.testing.assert_array_equal(f.cam2head[:3, :3], true.cam2head[:3, :3])
            np.testing.assert_allclose(f.cam2head[:3, 3], factor * true.cam2head[:3, 3], rtol=1e-5)


def test_clips_may_be_filmed_from_nearer_and_farther_with_heads_of_one_size_in_the_picture(clips):
    factors = []
    for sort in procedural_sets(**SMALL, distance_spread=0.5):
        for f, ordinary in zip(sort.clip(1), clips[sort.name], strict=True):
            np.testing.assert_array_equal(f.expression, ordinary.expression)
            factor = f.K[0, 0] / ordinary.K[0, 0]
            factors.append((f.person, round(float(factor), 4)))
            before, now = (head_to_world(g.expression) @ g.cam2head for g in (ordinary, f))
            np.testing.assert_allclose(now[:3, 3], factor * before[:3, 3], atol=1e-5)
            np.testing.assert_allclose(now[:3, :3], before[:3, :3], atol=1e-5)
            assert np.mean(f.mask > 127) == pytest.approx(np.mean(ordinary.mask > 127), rel=0.1)
    assert len(set(factors)) == len({person for person, _ in factors}) == 3
    assert all(1 / 1.5 <= factor <= 1.5 and abs(factor - 1) > 1e-3 for _, factor in factors)


def test_multiview_code_is_the_same_for_all_cameras(clips):
    for timestep in range(2):
        codes = [f.expression for f in clips["procedural_multiview"] if f.timestep == timestep]
        assert all(np.array_equal(code, codes[0]) for code in codes)


def test_codes_hold_rotations_and_move_from_moment_to_moment(clips):
    frames = clips["procedural_monocular"]
    for f in frames:
        for part in ("jaw", "neck", "R"):
            six = f.expression[expression_part(part)]
            np.testing.assert_allclose(
                cameras.rotation_to_6d(cameras.rotation_from_6d(six)), six, atol=1e-5
            )
    assert np.ptp([f.expression for f in frames], axis=0)[:10].min() > 0.05


def test_a_seed_decides_every_bit(sets, clips):
    again = procedural_sets(**SMALL)
    for s in again:
        for f, g in zip(s.clip(1), clips[s.name], strict=True):
            np.testing.assert_array_equal(f.image, g.image)
            np.testing.assert_array_equal(f.mask, g.mask)
            np.testing.assert_array_equal(f.cam2head, g.cam2head)
            np.testing.assert_array_equal(f.expression, g.expression)
    other = next(procedural_sets(**{**SMALL, "seed": 6})[0].clip(1))
    assert not np.array_equal(other.image, clips["procedural_monocular"][0].image)


def test_people_differ_within_and_between_sets(sets):
    looks, names = [], set()
    for s in sets.values():
        for i in range(s.num_clips):
            frame = next(s.clip(i))
            looks.append(frame.image)
            names.add(frame.person)
    assert len(names) == len(looks) == 7
    for i, a in enumerate(looks):
        for b in looks[:i]:
            assert np.abs(a.astype(int) - b).mean() > 5


def test_a_clip_does_not_depend_on_how_many_there_are(sets, clips):
    more = procedural_sets(**{**SMALL, "monocular_people": 30})[0]
    frame = next(more.clip(1))
    np.testing.assert_array_equal(frame.image, clips["procedural_monocular"][0].image)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 8),
        ("size", 1024),
        ("test_people", 0),
        ("seed", -1),
        ("reported_turn", 1.5),
        ("reported_size", 3),
        ("distance_spread", -0.1),
    ],
)
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=f"{field}.* got {value}"):
        procedural_sets(**{field: value})


def test_unknown_clip_is_refused(sets):
    with pytest.raises(IndexError, match="clips 0 to 2, not 3"):
        next(sets["procedural_monocular"].clip(3))
