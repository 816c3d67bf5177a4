"""The web page of an avatar, in headless Chromium: as true as the decoder, and it answers."""

import re

import numpy as np
import pytest
from browser import chromium, decode_picture, open_page, wait_until
from lively_model import CAM2HEAD, K, lively_avatar, lively_model, psnr

from data_pipelines.frame import neutral_code
from data_pipelines.procedural.performance import perform
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.export.command import export_page
from flexavatar_jax.avatars.export.fidelity import page_picture
from flexavatar_jax.avatars.sliders import move, sliders_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 96
CLIP = perform(np.random.default_rng(0), 6)
READY = "canvas[data-ready]"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "head.html"
    avatar = lively_avatar()
    clips = {"talk": CLIP}
    view = avatar.cam2head, avatar.K
    export_page(path, lively_model(), avatar.code, clips, *view, name=avatar.name, pairs=False)
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def tab(browser, page_file):
    return open_page(browser, page_file.as_uri(), READY)


@pytest.fixture(scope="module")
def animator():
    return Animator(lively_model(), chunk=1)


def shown(tab, values=None, frame=None) -> np.ndarray:
    """The page's picture for sliders or a frame of the clip, from the avatar's own camera."""
    return page_picture(tab, CAM2HEAD, K, SIZE, values or {}, frame)


def as_on_screen(tab) -> np.ndarray:
    """The picture of the page as a user has it."""
    script = """async () => {
      page.fixed = null;
      await page.settle();
      page.draw();
      return page.canvas.toDataURL();
    }"""
    return decode_picture(tab.evaluate(script))


@pytest.fixture(autouse=True)
def _at_rest(request):
    if "tab" in request.fixturenames:
        request.getfixturevalue("tab").click("#reset")


def decoded(animator, code) -> np.ndarray:
    return animator.render(lively_avatar().code, code[None], CAM2HEAD[None], K[None], size=SIZE)[0]


def test_the_page_opens_without_a_complaint_and_asks_for_nothing(tab, page_file):
    assert tab.troubles == []
    assert not tab.is_visible("#message")
    outside = [r for r in tab.requests if not r.startswith(("blob:", "data:"))]
    assert outside == [page_file.as_uri()]
    assert "somebody <0>" in tab.title()  # escaped, not a tag


def test_nothing_in_the_file_points_outside(page_file):
    text = page_file.read_text()
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text


def test_at_rest_it_is_the_decoders_picture(tab, animator):
    expected = decoded(animator, neutral_code())
    assert psnr(shown(tab), expected) > 50
    assert expected.std() > 0.05


@pytest.mark.parametrize("value", [("smile", 2.0), ("cheeks out", 1.0), ("blink left", 1.0)])
def test_sliders_at_their_ends_are_the_decoders_pictures(value, tab, animator):
    sliders = sliders_of(lively_model().config)
    expected = decoded(animator, move(neutral_code(), sliders, dict([value])))
    assert psnr(shown(tab, dict([value])), expected) > 45
    assert psnr(expected, decoded(animator, neutral_code())) < 40  # it shows


@pytest.mark.parametrize("frame", [2, 5])
def test_frames_of_a_performance_are_the_decoders_pictures(frame, tab, animator):
    expected = decoded(animator, CLIP[frame])
    assert psnr(shown(tab, frame=frame), expected) > 45
    assert psnr(expected, decoded(animator, neutral_code())) < 40


def test_a_slider_that_is_moved_changes_the_picture(tab):
    before = as_on_screen(tab)
    tab.focus('input[aria-label="smile"]')
    tab.keyboard.press("End")
    after = as_on_screen(tab)
    assert np.abs(after - before).max() > 0.1
    tab.click("#reset")
    assert np.abs(as_on_screen(tab) - before).max() < 0.02


def test_random_faces_differ_and_reset_brings_the_first_back(tab):
    before = as_on_screen(tab)
    for _ in range(20):  # all sliders may happen to stay
        tab.click("#random")
        if tab.evaluate("Object.keys(page.values).length"):
            break
    assert np.abs(as_on_screen(tab) - before).max() > 0.01
    tab.click("#reset")
    assert np.abs(as_on_screen(tab) - before).max() < 0.02


def test_a_drag_turns_the_head_and_the_wheel_comes_nearer(tab):
    before = as_on_screen(tab)
    box = tab.locator("#view").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 80, y, steps=3)
    tab.mouse.up()
    assert tab.evaluate("page.camera.yaw") < -0.5  # the camera goes the other way
    turned = as_on_screen(tab)
    assert np.abs(turned - before).max() > 0.1
    tab.mouse.wheel(0, -400)
    wait_until(tab, "page.camera.zoom > 1.3")
    assert np.mean(as_on_screen(tab) < 0.9) > np.mean(turned < 0.9)


def test_a_finger_turns_and_two_pinch(tab):
    """As a phone sends them: pointer events of kind touch."""
    tab.evaluate(
        """() => {
          const view = page.canvas;
          view.setPointerCapture = () => {};
          const send = (kind, id, x, y) => view.dispatchEvent(new PointerEvent(kind,
            { pointerId: id, pointerType: "touch", clientX: x, clientY: y, bubbles: true }));
          send("pointerdown", 1, 100, 100);
          send("pointermove", 1, 160, 100);
          page.turned = page.camera.yaw;
          send("pointerdown", 2, 200, 100);
          send("pointermove", 2, 210, 100);
          send("pointermove", 2, 260, 100);
          send("pointerup", 1, 160, 100);
          send("pointerup", 2, 260, 100);
        }"""
    )
    assert tab.evaluate("page.turned") < -0.3
    assert tab.evaluate("page.camera.zoom") > 1.5


def test_play_plays_and_scrubbing_stops_it(tab):
    tab.click("#play")
    wait_until(tab, "page.clip && page.clip.frame > 0.5")
    assert tab.inner_text("#play") == "Pause"
    tab.focus("#frame")
    tab.keyboard.press("End")
    wait_until(tab, "page.clip.frame === 5")
    assert tab.inner_text("#play") == "Play"
    still = as_on_screen(tab)
    assert np.abs(still - as_on_screen(tab)).max() == 0


def test_a_narrow_screen_has_the_head_above_and_the_sliders_below(browser, page_file):
    phone = open_page(browser, page_file.as_uri(), READY, width=390, height=780)
    head, panel = (phone.locator(s).bounding_box() for s in ("#view", "#panel"))
    assert head["width"] == panel["width"] == 390
    assert panel["y"] >= head["y"] + head["height"] > 390
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    phone.close()
