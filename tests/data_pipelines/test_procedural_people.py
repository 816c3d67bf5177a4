"""Procedural people: they differ, in front and behind, and a picture shows it."""

import collections

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from data_pipelines import cameras
from data_pipelines.frame import neutral_code
from data_pipelines.head_mesh import HeadShape, head_surface, template_mesh
from data_pipelines.procedural import anatomy, hair
from data_pipelines.procedural.__main__ import main
from data_pipelines.procedural.figure import Figure
from data_pipelines.procedural.person import Person, sample_person
from data_pipelines.procedural.renderer import render
from data_pipelines.procedural.skin import EYE_ROW, EYE_WIDTH


@pytest.fixture(scope="module")
def people() -> list[Person]:
    return [sample_person(np.random.default_rng([1, i])) for i in range(400)]


def test_equal_generators_give_equal_people():
    one, two, other = (sample_person(np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert repr(one) == repr(two)
    assert repr(one) != repr(other)


def test_a_crowd_has_every_style_and_every_back(people):
    styles = collections.Counter(p.hair.style for p in people)
    assert len(styles) == 12
    assert max(styles.values()) < 100
    assert len({p.back.tail for p in people}) == 7
    assert len({p.back.pattern for p in people}) == 7
    assert len({p.beard for p in people}) == 5


def test_the_front_foretells_the_back_in_part(people):
    """Tied hair in front makes a tail likelier than short hair does, and says not which."""
    pulled = [p.back.tail for p in people if p.hair.style == "pulled"]
    short = [p.back.tail for p in people if p.hair.style == "short"]
    assert sum(tail != "none" for tail in pulled) > 0.6 * len(pulled)
    assert set(short) == {"none"}
    assert len(set(pulled)) >= 4
    for style in ("short", "long", "buzz"):
        patterns = {p.back.pattern for p in people if p.hair.style == style}
        assert {"none"} < patterns


def test_colors_are_colors(people):
    for p in people:
        for color in (p.skin, p.lips, p.iris, p.cloth, p.hair.color, p.back.color):
            assert len(color) == 3
            assert min(color) >= 0
            assert max(color) <= 1


def test_hair_stays_within_reach_of_the_template(people):
    """The model's Gaussians reach 0.1 m from the template along each axis."""
    template = cKDTree(template_mesh().vertices)
    checked = 0
    for p in people[:40]:
        points = hair.hair_mesh(p).vertices
        points = points[points[:, 1] > -0.17]  # what pictures show
        if len(points):
            along_an_axis, _ = template.query(points, p=np.inf)
            assert along_an_axis.max() < 0.1
            checked += 1
    assert checked > 20


def test_hair_covers_the_scalp_from_outside(people):
    for p in [p for p in people if p.hair.style == "short"][:3]:
        shell = hair.hair_mesh(p).vertices
        u, v = np.array([0.0, 0.25, 0.75]), np.array([0.2, 0.2, 0.2])
        for point in head_surface(u, v, p.shape):
            nearest = shell[np.argmin(np.linalg.norm(shell - point, axis=-1))]
            center = np.array([0, 0.01, -0.03])
            assert np.linalg.norm(nearest - center) > np.linalg.norm(point - center)


def test_meshes_name_only_vertices_they_have(people):
    count = len(anatomy.anatomy().u)
    assert anatomy.anatomy().faces.max() < count
    for p in people[:20]:
        mesh = hair.hair_mesh(p)
        assert len(mesh.vertices) == len(mesh.uvs) == len(mesh.twins)
        if len(mesh.faces):
            assert mesh.faces.min() >= 0
            assert mesh.faces.max() < len(mesh.vertices)
            assert np.isfinite(mesh.vertices).all()


def test_slits_lie_on_the_lines_of_lips_and_lids():
    a = anatomy.anatomy()
    lower = np.flatnonzero((a.side[a.skin] == -1) & (a.v[a.skin] == EYE_ROW))
    x = np.sort(np.abs(a.rest[lower, 0]))
    assert x.min() > 0.0315 - EYE_WIDTH
    assert x.max() < 0.0315 + EYE_WIDTH
    neutral = anatomy.neutral_vertices(HeadShape(), 1.0, 1.0)
    for twin in lower:  # closed at rest: each has its double on the other side
        same = np.linalg.norm(neutral[a.skin] - neutral[twin], axis=-1) < 1e-9
        assert same.sum() == 2


def test_back_and_front_of_a_patterned_head_differ(people):
    person = next(p for p in people if p.hair.style == "buzz" and p.back.pattern == "stripes")
    scene = Figure(person, 64).scene(neutral_code())
    K = np.array([[3.05, 0, 0.5], [0, 3.05, 0.5], [0, 0, 1]])
    grey = np.full((64, 64, 3), 0.5, np.float32)
    around = [cameras.orbit(azimuth, 0, 1, np.array([0, 0, -0.02])) for azimuth in (0, 180)]
    views = [render(scene, camera, K, 64, grey) for camera in around]
    head = np.s_[10:40, 24:40]
    stripe, plain = np.array(person.back.color), np.array(person.hair.color)
    assert np.abs(stripe - plain).max() > 0.1
    spread = [image[head].astype(float).std((0, 1)).sum() for image, _ in views]
    masks = [mask[head] for _, mask in views]
    assert all(mask.min() == 255 for mask in masks)
    assert np.abs(views[0][0][head].astype(float) - views[1][0][head]).mean() > 10
    assert min(spread) > 3


def test_contact_sheet(tmp_path, capsys):
    path = tmp_path / "new" / "sheet.png"
    assert main(["--out", str(path), "--people", "2", "--size", "32"]) == 0
    with Image.open(path) as sheet:
        assert sheet.size == (8 * 32, 2 * 32)
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 500
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]
    assert str(path) in capsys.readouterr().out


def test_contact_sheet_of_nobody_is_refused(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    assert main(["--out", str(path), "--people", "0"]) == 2
    assert "error: a contact sheet needs 1 or more people" in capsys.readouterr().err
    assert not path.exists()
