"""The evaluation's page of pictures."""

import re

import numpy as np
from ml_collections import ConfigDict

from flexavatar_jax.evaluation.face_motion import FaceMotion
from flexavatar_jax.evaluation.report import (
    AVATAR_PAGE,
    SHOWN_TARGETS,
    TILE,
    Orbit,
    TestPerson,
    person_grid,
    write_report,
)


def test_pictures_say_from_where_they_were_taken():
    def grid(*sectors):
        grey = np.full((2, 32, 32, 3), 0.5)
        return person_grid(TestPerson("anna", grey[0], list(sectors), grey, grey))

    difference = np.abs(grid("front", "side") - grid("front", "back")).max(axis=(0, 2))
    tiles = difference.reshape(1 + SHOWN_TARGETS, TILE).max(axis=1)
    # The first half of the tiles shows the first target, the second half the second.
    half = SHOWN_TARGETS // 2
    np.testing.assert_array_equal(tiles > 0, [False] * (1 + half) + [True] * half)


def test_the_report_shows_the_avatar_and_says_what_its_pictures_show(tmp_path):
    grey = np.full((2, 16, 16, 3), 0.5)
    anna = TestPerson("anna <3", grey[0], ["side", "front"], grey, grey)
    metrics = dict(images=2, people=1, dataset="x", steps=1, seconds=1.0, steadiness=40.0)
    metrics |= dict(mouth_correlation=0.5, mouth_strength=0.5, jaw_change=0.1)
    metrics |= dict(eyes_correlation=0.4, eyes_strength=0.3)
    arguments = (tmp_path, ConfigDict(dict(data=dict(mixture={}))), metrics, [anna])
    (tmp_path / AVATAR_PAGE).write_text("the avatar")
    orbits = [Orbit("multi-view sink", np.repeat(grey, 4, axis=0))]
    write_report(
        *arguments,
        orbits,
        grey[0],
        moved=[FaceMotion(np.repeat(grey[:1], 4, axis=0), 0.1, 0.1)],
        log=[],
    )
    page = (tmp_path / "index.html").read_text()
    assert f'<iframe src="{AVATAR_PAGE}" title="the avatar of anna &lt;3' in page
    assert (tmp_path / "avatar_truth.png").exists()
    pictures = re.findall(r"<img [^>]*>", page)
    assert len(pictures) >= 5
    assert all(re.search(r'alt="[^"]{5,}"', picture) for picture in pictures)
    assert 'name="viewport"' in page
    assert not re.search(r"(https?:)?//", re.sub(r"</?\w+|/>", "", page))
