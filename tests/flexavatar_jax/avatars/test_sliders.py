"""Sliders: directions of the expression code that do what their names say."""

import numpy as np
import pytest

from configs import demo, flex1
from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import expression_part, neutral_code
from data_pipelines.procedural.anatomy import anatomy
from data_pipelines.procedural.expression import BLENDSHAPES, deform
from flexavatar_jax.avatars.sliders import move, random_values, sliders_of

PROCEDURAL = sliders_of(demo.get_config())
FLAME = sliders_of(flex1.get_config())
EYES = np.array([[0.032, 0.02, 0.01], [-0.032, 0.02, 0.01]])


def face(**values) -> np.ndarray:
    """Vertices of a procedural head after sliders, underscores for blanks."""
    values = {name.replace("_", " "): value for name, value in values.items()}
    code = move(neutral_code(), PROCEDURAL, values)
    return deform(anatomy().rest.astype(np.float32), EYES, 1.0, 0.0, code)


def eye_direction(part: str, **values) -> np.ndarray:
    """Where the first (left) or second eye looks."""
    code = move(neutral_code(), PROCEDURAL, {k.replace("_", " "): v for k, v in values.items()})
    rotations = cameras.rotation_from_6d(code[expression_part("eyes")].reshape(2, 6))
    return rotations[("left", "right").index(part)] @ [0, 0, 1]


def test_models_of_procedural_heads_have_names_and_others_numbers():
    named, numbered = ({s.name for s in sliders} for sliders in (PROCEDURAL, FLAME))
    assert {name.replace("_", " ") for name in BLENDSHAPES} <= named
    assert {f"expression {i}" for i in range(1, 11)} <= numbered
    assert "smile" not in numbered
    both = {"jaw open", "blink left", "blink right", "gaze left", "gaze up", "neck turn"}
    assert both <= named & numbered


def test_a_mixture_with_real_captures_has_numbers():
    config = demo.get_config()
    config.data.mixture.nersemble = 0.0
    assert sliders_of(config)[1].name == "smile"
    config.data.mixture.nersemble = 0.5
    assert sliders_of(config)[1].name == "expression 1"


def test_the_jaw_opens_downwards():
    lower_teeth = anatomy().teeth[1]
    assert np.mean((face(jaw_open=20) - face())[lower_teeth, 1]) < -0.01


def test_a_smile_lifts_the_corners_of_the_mouth():
    moved = face(smile=1) - face()
    assert np.max(moved[:, 1]) > 0.003
    assert np.max((face(smile=-1) - face())[:, 1]) < np.max(moved[:, 1])


def test_the_eyes_look_where_the_sliders_say():
    for eye in ("left", "right"):
        assert eye_direction(eye, gaze_left=20)[0] == pytest.approx(np.sin(np.radians(20)))
        assert eye_direction(eye, gaze_up=10)[1] == pytest.approx(np.sin(np.radians(10)))


def test_the_left_lid_is_the_persons_left():
    moved = np.abs(face(blink_left=1) - face()).max(axis=1) > 1e-4
    assert moved.any()
    assert (anatomy().rest[moved, 0] > 0).all()


@pytest.mark.parametrize("sliders", [PROCEDURAL, FLAME])
def test_sliders_at_rest_leave_the_code_alone(sliders):
    base = np.random.default_rng(0).normal(size=135).astype(np.float32)
    for part in ("eyes", "neck", "jaw", "R"):  # of rotations
        sixes = base[expression_part(part)].reshape(-1, 6)
        orthonormal = cameras.rotation_to_6d(cameras.rotation_from_6d(sixes))
        base[expression_part(part)] = orthonormal.reshape(-1)
    np.testing.assert_allclose(move(base, sliders, {s.name: 0.0 for s in sliders}), base, atol=1e-6)
    assert all(s.low <= 0 <= s.high for s in sliders)


def test_every_blendshape_answers_to_the_ends_of_its_range():
    """No part of a range is beyond what the face is limited to."""
    for slider in PROCEDURAL[1:11]:
        for end in filter(None, (slider.low, slider.high)):
            almost, there = (face(**{slider.name.replace(" ", "_"): end * s}) for s in (0.9, 1))
            assert np.abs(almost - there).max() > 1e-5, slider.name


def test_sliders_of_a_rotation_turn_it_together_and_further():
    base = neutral_code()
    base[expression_part("neck")] = cameras.rotation_to_6d(cameras.axis_angle([0, 1, 0], 0.1))
    turned = move(base, FLAME, {"neck turn": 10.0})
    rotation = cameras.rotation_from_6d(turned[expression_part("neck")])
    expected = cameras.axis_angle([0, 1, 0], 0.1 + np.radians(10))
    np.testing.assert_allclose(rotation, expected, atol=1e-6)
    both = move(neutral_code(), FLAME, {"neck turn": 3.0, "neck nod": 4.0})
    rotation = cameras.rotation_from_6d(both[expression_part("neck")])
    assert np.degrees(np.arccos((np.trace(rotation) - 1) / 2)) == pytest.approx(5.0, rel=1e-3)


def test_an_unknown_slider_is_named():
    with pytest.raises(UserError, match=r"there is no slider 'grin'; there are jaw open, smile"):
        move(neutral_code(), PROCEDURAL, {"grin": 1.0})


def test_random_faces_stay_in_range_and_close_both_eyes_alike():
    ranges = {s.name: (s.low, s.high) for s in PROCEDURAL}
    rng = np.random.default_rng(1)
    for _ in range(50):
        values = random_values(PROCEDURAL, rng)
        assert all(ranges[n][0] <= v <= ranges[n][1] for n, v in values.items())
        assert values.get("blink left") == values.get("blink right")
