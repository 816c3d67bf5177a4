"""The animator: what it renders follows what it is given, and nonsense gets a sentence."""

import numpy as np
import pytest

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import MONOCULAR
from kernels import rasterize, rendering

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (24, 24, 3), np.uint8)
MASK = np.full((24, 24), 255, np.uint8)
VIEW = cameras.orbit(10, 5, 1.0, np.zeros(3)).astype(np.float32)
K = np.array([[3, 0, 0.5], [0, 3, 0.5], [0, 0, 1]], np.float32)
EXPRESSIONS = RNG.standard_normal((3, 135)).astype(np.float32)


@pytest.fixture(scope="module")
def code(animator):
    return animator.encode(IMAGE, MASK, VIEW, K)


def test_expression_camera_code_and_sink_each_change_the_picture(animator, code):
    (first,) = animator.render(code, EXPRESSIONS[0], VIEW, K)
    assert np.ptp(first) > 0.2

    def changed(*args, **options):
        (other,) = animator.render(*args, **options)
        return np.abs(other - first).max() > 0.02

    turned = cameras.orbit(90, 5, 1.0, np.zeros(3))
    assert not changed(code, EXPRESSIONS[0], VIEW, K)
    assert changed(code, EXPRESSIONS[1], VIEW, K)
    assert changed(code, EXPRESSIONS[0], turned, K)
    assert changed(code[::-1], EXPRESSIONS[0], VIEW, K)
    assert changed(code, EXPRESSIONS[0], VIEW, K, source=MONOCULAR)


def test_pictures_come_one_by_one_as_they_are_asked_for(animator, code, monkeypatch):
    """Nothing is rendered before it is wanted; a film's length takes no memory."""
    rendered = []
    real = rendering.choose_capacity
    monkeypatch.setattr(
        rendering,
        "choose_capacity",
        lambda *args, **size: rendered.append(1) or real(*args, **size),
    )
    frames = animator.frames(code, np.repeat(EXPRESSIONS, 1000, axis=0), VIEW, K)
    assert not rendered
    next(frames)
    assert len(rendered) == 1
    (again,) = animator.render(code, EXPRESSIONS[1], VIEW, K)
    one_by_one = [frame for frame, _ in zip(frames, range(1000), strict=False)]
    assert len(rendered) == 2 + 250
    np.testing.assert_allclose(one_by_one[999], again, atol=1e-6)


def test_a_code_for_each_picture_is_the_same_as_one_by_one(animator, code):
    codes = np.stack([code, code[::-1]])
    together = animator.render(codes, EXPRESSIONS[0], VIEW, K)
    for picture, one in zip(together, codes, strict=True):
        np.testing.assert_allclose(
            picture, animator.render(one, EXPRESSIONS[0], VIEW, K)[0], atol=1e-6
        )


def test_gaussians_are_those_that_are_rendered(animator, code):
    gaussians = animator.gaussians(code, EXPRESSIONS)
    assert gaussians.means.shape[:1] == (3,)
    assert all(isinstance(x, np.ndarray) for x in gaussians[:5])
    np.testing.assert_allclose(np.linalg.norm(gaussians.quats, axis=-1), 1, atol=1e-5)
    assert gaussians.opacities.min() > 0
    assert gaussians.opacities.max() < 1
    assert gaussians.colors.min() >= 0
    pixels = np.diag([24, 24, 1]) @ K
    out = rasterize(
        *(x[1] for x in gaussians[:5]),
        np.linalg.inv(VIEW).astype(np.float32),
        pixels.astype(np.float32),
        width=24,
        height=24,
        background=np.ones(3, np.float32),
    )
    (picture,) = animator.render(code, EXPRESSIONS[1], VIEW, K)
    np.testing.assert_allclose(np.clip(out.color, 0, 1), picture, atol=1e-5)


def test_transparent_pictures_are_the_same_on_any_colour(animator, code):
    (clear,) = animator.render(code, EXPRESSIONS[0], VIEW, K, background=None)
    assert clear.shape == (24, 24, 4)
    assert clear[..., 3].min() < 0.5
    for colour in ((0.2, 0.5, 0.9), (1.0, 1.0, 1.0)):
        (opaque,) = animator.render(code, EXPRESSIONS[0], VIEW, K, background=colour)
        alpha = clear[..., 3:]
        np.testing.assert_allclose(
            clear[..., :3] * alpha + (1 - alpha) * np.array(colour), opaque, atol=2e-3
        )


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (IMAGE.astype(np.float32) / 255, MASK),
        (IMAGE / 255, np.ones((24, 24))),
        (IMAGE, np.ones((24, 24), bool)),
    ],
)
def test_portraits_of_another_kind_mean_the_same(animator, code, image, mask):
    np.testing.assert_allclose(animator.encode(image, mask, VIEW, K), code, atol=1e-5)


def test_portraits_are_resized_as_in_training(animator, code):
    np.testing.assert_allclose(
        animator.encode(IMAGE.repeat(2, 0).repeat(2, 1), MASK.repeat(2, 0).repeat(2, 1), VIEW, K),
        code,
        atol=0.05,
    )


NOT_RIGID = VIEW * np.array([[2], [2], [2], [1]])


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(image=IMAGE.astype(np.float32)), r"image's floats must be finite and in \[0, 1\]"),
        (dict(image=IMAGE.astype(np.int64)), "image is int64; expected uint8"),
        (dict(image=IMAGE[..., 0]), r"RGB, \[H, W, 3\], not \[24, 24\]"),
        (dict(image=IMAGE[:20], mask=MASK[:20]), "square, not 24x20"),
        (dict(mask=MASK[:20]), r"mask must have the image's size \[24, 24\], not \[20, 24\]"),
        (dict(mask=0 * MASK), "mask is empty"),
        (
            dict(K=np.diag([512, 512, 1]) @ K),
            "K is in pixels",
        ),
        (dict(K=-np.eye(3)), "focal length that is not positive"),
        (dict(K=np.full((3, 3), np.nan)), "K holds numbers that are not finite"),
        (dict(cam2head=NOT_RIGID), "upper left 3x3 is no rotation"),
        (dict(cam2head=VIEW[:3]), r"cam2head must be \[4, 4\]"),
    ],
)
def test_a_portrait_that_cannot_be_meant_gets_a_sentence(animator, change, sentence):
    portrait = dict(image=IMAGE, mask=MASK, cam2head=VIEW, K=K) | change
    with pytest.raises(UserError, match=sentence):
        animator.encode(**portrait)


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(source=7), "source is 7; expected 1"),
        (dict(size=0), "size is 0; expected 1 or more"),
        (dict(expressions=np.zeros((0, 135))), "there are no frames to render"),
        (dict(expressions=np.zeros((2, 100))), r"must be \[E, 135\]"),
        (dict(expressions=np.full((1, 135), np.inf)), "not finite"),
        (dict(expressions=EXPRESSIONS, K=K[None]), "3 expressions, 3 cam2head and 1 K"),
        (dict(code=np.zeros((5, 5))), r"the avatar code is \[5, 5\]; this model's are \[16, 48\]"),
        (dict(K=K * 512), "K is in pixels"),
    ],
)
def test_a_film_that_cannot_be_meant_gets_a_sentence_before_it_starts(
    animator, code, change, sentence
):
    film = dict(code=code, expressions=EXPRESSIONS[0], cam2head=VIEW, K=K) | change
    with pytest.raises(UserError, match=sentence):
        animator.frames(**film)


def test_an_image_that_lacks_gaussians_is_an_error(animator, code, monkeypatch):
    monkeypatch.setattr(rendering, "choose_capacity", lambda *args, **size: (8, False))
    with pytest.raises(ValueError, match=r"images 0 to 2 lack \d+ intersections"):
        animator.render(code, EXPRESSIONS, VIEW, K)
