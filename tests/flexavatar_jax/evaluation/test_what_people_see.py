"""Measures of what people see, held to avatars whose answer is known: no network needed."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines import cameras
from data_pipelines.frame import expression_part, neutral_code
from data_pipelines.procedural.capture_sets import procedural_sets
from data_pipelines.procedural.figure import Figure
from data_pipelines.procedural.person import sample_person
from data_pipelines.procedural.renderer import render
from data_pipelines.shards import open_at_size
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.evaluation.entanglement import steadiness, turned
from flexavatar_jax.evaluation.face_motion import (
    PATCHES,
    cut,
    expression_following,
    face_motion,
    with_gaze,
    with_jaw,
)
from flexavatar_jax.evaluation.identity import identity_by_sector
from flexavatar_jax.evaluation.matrix import markdown, spread_text, table
from flexavatar_jax.evaluation.metrics import mask_iou
from flexavatar_jax.evaluation.people import Person, on_white, read_clip, read_people
from flexavatar_jax.evaluation.references import TrainingPeople

# Stand-ins with known answers take the places of avatars and data sets.
pytestmark = pytest.mark.usefixtures("any_types")

SIZE = 48


@pytest.fixture(scope="module")
def people():
    """Two procedural people, three moments before four cameras all round."""
    captures = procedural_sets(size=SIZE, test_people=2, test_timesteps=3, num_cameras=4)[2]
    clips = [list(captures.clip(i)) for i in range(2)]
    return [Person(frames[0].person, frames[0], frames[1:]) for frames in clips]


class Known(Animator):
    """In place of an animator: a `code` is what an avatar shows of (expression, cam2head)."""

    def __init__(self):
        pass

    def render(self, code, expressions, cam2head, K, **_):
        return np.stack([code(*inputs) for inputs in zip(expressions, cam2head, strict=True)])

    frames = render


def truth_of(person):
    """An avatar that shows the person's true picture."""

    def show(expression, cam2head):
        frames = [person.input, *person.targets]
        nearest = min(frames, key=lambda frame: np.abs(frame.cam2head - cam2head).sum())
        return on_white(nearest)

    return show


def grey(level):
    return lambda expression, cam2head: np.full((SIZE, SIZE, 3), level)


def test_identity_is_found_by_those_who_show_the_person(people):
    right = [truth_of(person) for person in people]
    assert identity_by_sector(Known(), people, right, SIZE) == {
        f"identity_{name}": 1.0 for name in ("all", "front", "side", "back")
    }
    swapped = identity_by_sector(Known(), people, right[::-1], SIZE)
    assert swapped["identity_all"] == 0
    from_behind = [person._replace(targets=person.targets[1:3]) for person in people]
    assert "identity_front" not in identity_by_sector(Known(), from_behind, right, SIZE)


def test_mask_iou():
    mask = np.zeros((3, 4, 4), np.uint8)
    mask[:2, :2] = 255
    alpha = np.zeros((3, 4, 4))
    alpha[0, :2] = 0.9
    alpha[1, :2, :2] = 0.9
    np.testing.assert_allclose(mask_iou(alpha, mask), [1.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("part", "before", "after", "times"),
    [
        ("mouth", with_jaw(neutral_code(), 0), with_jaw(neutral_code(), 0.4), 5),
        ("eyes", with_gaze(neutral_code(), -0.4), with_gaze(neutral_code(), 0.4), 15),
    ],
)
def test_the_patch_is_where_the_code_changes_the_picture(part, before, after, times):
    """From in front, the left, the right and above."""
    rng = np.random.default_rng(3)
    figure, K = (
        Figure(sample_person(rng), SIZE),
        np.array([[3.1, 0, 0.5], [0, 3.1, 0.5], [0, 0, 1]]),
    )
    white = np.ones((SIZE, SIZE, 3), np.float32)
    for azimuth, elevation in ((0, 0), (-25, 0), (25, 0), (0, 20)):
        camera = cameras.orbit(azimuth, elevation, 1.0, np.zeros(3))
        a, b = (render(figure.scene(c), camera, K, SIZE, white)[0] / 255 for c in (before, after))
        p, q = (cut(image, camera, K, PATCHES[part]) for image in (a, b))
        assert np.abs(p - q).mean() > times * np.abs(a - b).mean()


def clip_of(person):
    """What the input's camera saw of the person."""
    return [t for t in (person.input, *person.targets) if t.camera == person.input.camera]


def test_a_face_that_moves_as_the_truth_does_correlates(people):
    clips = [clip_of(person) for person in people]
    true = [np.stack([on_white(frame) for frame in clip]) for clip in clips]
    assert expression_following(clips, true) == measured(1.0, 1.0)
    weaker = [0.5 * images + 0.2 for images in true]
    assert expression_following(clips, weaker) == measured(1.0, 0.5)
    opposite = expression_following(clips, [1 - images for images in true])
    assert opposite == measured(-1.0, 1.0)
    faceless = expression_following(clips, [np.full_like(images, 0.5) for images in true])
    assert faceless == measured(0.0, 0.0)


def measured(correlation: float, strength: float) -> dict[str, float]:
    """The same of mouth and eyes."""
    of_part = {"correlation": correlation, "strength": strength}
    return {f"{part}_{key}": x for part in ("mouth", "eyes") for key, x in of_part.items()}


def test_a_face_seen_at_one_moment_only_is_not_measured(people):
    clips = [clip_of(person)[:1] for person in people]
    images = [np.stack([on_white(frame) for frame in clip]) for clip in clips]
    assert expression_following(clips, images) == {}
    assert expression_following([[]], [np.zeros((0, 4, 4, 3))]) == {}


def test_the_clip_is_the_inputs_camera_at_other_moments(tiny_config):
    data = open_at_size(Path(tiny_config.data.root) / "procedural_multiview", 32)
    (person,) = read_people(data, 1, 4, 32)
    clip = read_clip(data, person, 32)
    assert [frame.camera for frame in clip] == [person.input.camera]
    assert [frame.timestep for frame in clip] == [1 - person.input.timestep]


def test_a_faces_changes_are_what_the_code_does_to_it(people):
    jaw, eyes, lids = (expression_part(part) for part in ("jaw", "eyes", "eyelids"))

    def moves(expression, cam2head):
        level = 0.5 + 0.5 * expression[jaw][5] + 0.5 * expression[eyes][2] + expression[lids][0]
        return np.full((SIZE, SIZE, 3), level)

    face = face_motion(Known(), people[0], moves, SIZE)
    assert face.images.shape == (4, SIZE, SIZE, 3)
    assert face.jaw_change == pytest.approx(0.5 * np.sin(0.35), rel=1e-5)
    assert face.gaze_change == pytest.approx(np.sin(0.4), rel=1e-5)
    assert face_motion(Known(), people[0], grey(0.5), SIZE)[1:] == (0, 0)


@pytest.mark.parametrize(
    ("change", "parts"), [(with_jaw, ["jaw"]), (with_gaze, ["eyes", "eyelids"])]
)
def test_nothing_else_in_the_code_changes(people, change, parts):
    before = people[0].input.expression
    changed = change(before, 0.2) != before
    assert changed[expression_part(parts[0])].any()
    for part in parts:
        changed[expression_part(part)] = False
    assert not changed.any()


def test_an_avatar_that_turns_with_the_code_is_not_steady(people):
    pose = expression_part("R")

    def entangled(expression, cam2head):
        return np.full((SIZE, SIZE, 3), 0.5 + 0.1 * expression[pose][2])

    still = steadiness(Known(), people, [grey(0.5)] * 2, SIZE)
    moving = steadiness(Known(), people, [entangled] * 2, SIZE)
    assert still == 99.0
    assert moving < 30
    code = people[0].input.expression
    np.testing.assert_allclose(turned(turned(code, 20), -20), code, atol=1e-6)
    assert np.abs(turned(code, 20) - code).max() > 0.1


def test_the_nearest_training_person_is_seen_from_the_targets_direction(tiny_config, people):
    """Someone who is in the training data is found again."""
    found = TrainingPeople(tiny_config)
    data, records = found._clips[-1]
    frames = [data.frame(int(i), 32) for i in records]
    moment = [frame for frame in frames if frame.timestep == frames[0].timestep]
    front = max(moment, key=lambda f: f.cam2head[2, 3] / np.linalg.norm(f.cam2head[:3, 3]))
    views = found.views(Person("again", front, moment))
    same = [np.allclose(a, on_white(b)) for a, b in zip(views, moment, strict=True)]
    assert np.mean(same) > 0.5


def test_a_table_has_mean_and_spread_over_seeds():
    assert spread_text([1.0], 2) == "1.00"
    assert spread_text([1.0, 3.0], 2) == "2.00 ± 1.41"
    metrics = {"psnr_unseen_all": 16.0, "steps": 10}
    rows = table({"sinks": {"0": metrics, "1": {**metrics, "psnr_unseen_all": 18.0}}})
    text = markdown(rows)
    head, _, row = text.splitlines()
    assert head == "| config | seeds | steps | PSNR, dB |"
    assert row == "| sinks | 2 | 10 | 17.00 ± 1.41 |"
