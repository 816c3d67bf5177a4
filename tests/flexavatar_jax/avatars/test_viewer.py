"""`avatar view`: what its controls do, and its page in headless Chromium."""

import threading
import time

import numpy as np
import pytest
from browser import chromium, decode_png, open_page
from lively_model import lively_avatar, lively_model

from data_pipelines.frame import MONOCULAR, neutral_code
from data_pipelines.procedural.performance import perform
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.export.splats import covariances, turn
from kernels.ply import read_ply

viser = pytest.importorskip("viser", reason="viser is not installed: pip install '.[view]'")
viewer = pytest.importorskip("flexavatar_jax.avatars.viewer")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def shown():
    server = viser.ViserServer(host="127.0.0.1", port=8123, verbose=False)
    clips = {"talk": perform(np.random.default_rng(0), 12)}
    avatars = [lively_avatar(0), lively_avatar(1)]
    yield viewer.Viewer(server, Animator(lively_model()), avatars, clips)
    server.stop()


@pytest.fixture(autouse=True)
def _at_rest(request):
    if "shown" in request.fixturenames:
        found = request.getfixturevalue("shown")
        found.set_sliders({})
        found.wanted = viewer.Wanted(second=1)
        found.step()


def expected(code, expression, **options):
    return Animator(lively_model()).gaussians(code, expression[None], **options).means[0]


def test_it_opens_with_the_first_avatar_at_rest(shown):
    np.testing.assert_allclose(
        shown.gaussians.means, expected(lively_avatar(0).code, neutral_code()), atol=1e-5
    )


def test_the_scene_is_in_centimetres_as_half_precision_wants_it(shown):
    """Square metres of a head's covariances are below float16's normal numbers: 6e-5."""
    exact = covariances(shown.gaussians)
    assert np.median(np.abs(exact[:, 0, 0])) < 1e-3
    sent = shown._splats.covariances / viewer.SCENE_SCALE**2
    diagonal = np.arange(3)
    np.testing.assert_allclose(sent[:, diagonal, diagonal], exact[:, diagonal, diagonal], rtol=2e-3)
    np.testing.assert_allclose(
        shown._splats.centers, shown.gaussians.means * viewer.SCENE_SCALE, rtol=1e-6
    )


def test_a_slider_moves_the_splats_and_reset_brings_them_back(shown):
    rest = shown.gaussians.means
    shown.set_sliders({"smile": 1.5})
    shown.step()
    assert np.abs(shown.gaussians.means - rest).max() > 1e-4
    shown.set_sliders({})
    shown.step()
    np.testing.assert_array_equal(shown.gaussians.means, rest)


def test_between_two_people_lie_others(shown):
    shown._want(between=1.0)
    shown.step()
    np.testing.assert_allclose(
        shown.gaussians.means, expected(lively_avatar(1).code, neutral_code()), atol=1e-5
    )
    shown._want(between=0.5)
    shown.step()
    half = shown.gaussians.means
    for seed in (0, 1):
        assert np.abs(half - expected(lively_avatar(seed).code, neutral_code())).max() > 1e-4


def test_the_bias_sink_can_be_switched(shown):
    shown._want(source=MONOCULAR)
    shown.step()
    np.testing.assert_allclose(
        shown.gaussians.means,
        expected(lively_avatar(0).code, neutral_code(), source=MONOCULAR),
        atol=1e-5,
    )


def test_a_performance_plays_at_its_speed_and_goes_round(shown):
    shown._want(clip="talk")
    shown._advance(0.25)
    assert shown.wanted.frame == pytest.approx(6)
    shown._advance(0.375)
    assert shown.wanted.frame == pytest.approx(3)
    shown.step()
    frame = shown.clips["talk"][3]
    np.testing.assert_allclose(
        shown.gaussians.means, expected(lively_avatar(0).code, frame), atol=1e-5
    )


def test_a_dragged_slider_is_decoded_where_it_ends(shown):
    before = shown.updates
    for value in np.linspace(0, 2, 50):
        shown._want(values={"smile": float(value)})
    shown.step()
    assert shown.updates == before + 1
    assert shown.wanted.values == {"smile": 2.0}


def test_splats_are_saved_as_they_are_shown(shown, tmp_path):
    (tmp_path / "head.ply").write_bytes(shown.ply())
    read = turn(read_ply(tmp_path / "head.ply"), (-1, -1, 1))
    np.testing.assert_allclose(read.means, shown.gaussians.means, atol=1e-6)


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def running(shown):
    """The viewer at work, as its command has it."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            shown.step(timeout=0.05)

    thread = threading.Thread(target=work)
    thread.start()
    yield f"http://127.0.0.1:{shown.server.get_port()}"
    stop.set()
    thread.join()


def picture(tab):
    """Of the scene once it stands still, without the panel."""
    last = None
    for _ in range(40):
        time.sleep(0.5)
        now = decode_png(tab.screenshot(clip=dict(x=0, y=0, width=400, height=480)))
        if last is not None and np.abs(now - last).max() < 0.02:
            return now
        last = now
    return now


def test_two_tabs_show_the_same_avatar_and_follow_a_slider(running, browser, shown):
    tabs = [open_page(browser, running, "text=smile", 760, 480) for _ in range(2)]
    for tab in tabs:
        tab.wait_for_function("document.querySelector('canvas')")
    before = [picture(tab) for tab in tabs]
    assert before[0].std() > 0.05
    assert np.mean(np.abs(before[0] - before[1])) < 0.01
    shown._want(between=1.0)
    time.sleep(1)
    for tab, old in zip(tabs, before, strict=True):
        assert np.mean(np.abs(picture(tab) - old)) > 0.01
    for tab in tabs:
        tab.close()


@pytest.mark.slow
def test_closed_tabs_leave_nothing_behind(running, browser, shown):
    def open_and_close():
        tab = open_page(browser, running, "text=smile", 300, 200)
        tab.close()

    def settle():
        for _ in range(100):
            if not shown.server.get_clients():
                break
            time.sleep(0.1)
        return threading.active_count()

    for _ in range(3):
        open_and_close()
    threads = settle()
    for _ in range(12):
        open_and_close()
    assert settle() <= threads + 2
    assert not shown.server.get_clients()
