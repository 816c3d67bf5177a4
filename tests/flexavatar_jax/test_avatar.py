"""Avatars of real tracked portraits, rendered to files."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import UserError
from flexavatar_jax import avatar
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.camera_paths import orbit_cameras
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.train import train
from kernels import rasterizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(make_tiny_config, tmp_path_factory):
    config, workdir = make_tiny_config(), tmp_path_factory.mktemp("run")
    config.steps = 1
    train(config, workdir)
    return workdir


def test_an_orbit_keeps_its_distance_and_starts_at_the_input(shared_dir):
    start = np.eye(4)
    start[:3, 3] = 0.1, 0.2, 1.0
    views = orbit_cameras(start, 8)
    np.testing.assert_allclose(views[0], start)
    np.testing.assert_allclose(
        np.linalg.norm(views[:, :3, 3], axis=1), np.linalg.norm([0.1, 0.2, 1])
    )
    np.testing.assert_allclose(views[4, :3, 3], [-0.1, 0.2, -1.0], atol=1e-12)


@pytest.fixture(scope="module")
def animator(run):
    return Animator(load_model(run))


def views(animator, expressions=3, cameras=3, Ks=3):
    """Arguments of `Animator.render`: so many of each."""
    code = animator.encode(
        np.zeros((32, 32, 3), np.uint8), np.full((32, 32), 255, np.uint8), np.eye(4), np.eye(3)
    )
    cam2head, K = np.eye(4), np.eye(3)
    cam2head[2, 3], cam2head[1, 1], cam2head[2, 2] = 1, -1, -1
    return (
        code,
        np.zeros((expressions, 135)),
        np.repeat(cam2head[None], cameras, axis=0),
        np.repeat(K[None], Ks, axis=0),
    )


def test_there_is_a_camera_for_every_expression(animator):
    assert animator.render(*views(animator)).shape == (3, 32, 32, 3)
    with pytest.raises(ValueError, match="4 expressions, 3 cam2head and 4 K; give one of each"):
        animator.render(*views(animator, expressions=4, Ks=4))
    with pytest.raises(ValueError, match="3 expressions, 3 cam2head and 1 K; give one of each"):
        animator.render(*views(animator, Ks=1))


def test_an_image_that_lacks_gaussians_is_an_error(animator, monkeypatch):
    monkeypatch.setattr(rasterizer, "choose_capacity", lambda *args: 8)
    with pytest.raises(ValueError, match=r"images 0 to 2 lack \d+ intersections"):
        animator.render(*views(animator))


def test_a_real_portrait_is_rendered_all_the_way_round(run, shared_dir, tmp_path):
    portrait = shared_dir / "real" / "inputs" / "marble_sculpture.jpg"
    command = ["render", "--workdir", str(run), "--portrait", str(portrait), "--frames", "4"]
    avatar.main([*command, "--out", str(tmp_path / "orbit.gif")])
    with Image.open(tmp_path / "orbit.gif") as gif:
        assert (gif.size, gif.n_frames) == ((32, 32), 4)


def test_a_real_performance_drives_a_real_portrait(run, shared_dir, tmp_path):
    portrait = shared_dir / "real" / "inputs" / "asian_watercolor_girl.jpg"
    driving = shared_dir / "real" / "driving" / "EMO-1-shout+laugh"
    command = ["render", "--workdir", str(run), "--portrait", str(portrait)]
    avatar.main([*command, "--driving", str(driving), "--out", str(tmp_path / "driven.mp4")])
    assert (tmp_path / "driven.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(portrait="nobody/inputs/nobody.jpg"), "nobody"),
        (dict(out="film.avi"), ".mp4"),
        (dict(out="no/such/folder/film.mp4"), "no/such/folder"),
        (dict(workdir="nowhere"), "nowhere"),
        (dict(driving="no/performance"), "no/performance"),
        (dict(driving="DIR", frames=7), "leave out --frames or --driving"),
        (dict(size=-4), "--size is -4; expected 1 or more"),
        (dict(size=0), "--size is 0; expected 1 or more"),
        (dict(backend="metal"), "backend is 'metal'; expected 'auto' or one of"),
        (dict(frames=0), "--frames is 0; expected 1 or more"),
    ],
)
def test_mistakes_are_named_in_one_sentence(change, expected, shared_dir, tmp_path, capsys):
    options = dict(
        workdir=str(tmp_path),
        portrait=str(shared_dir / "real" / "inputs" / "marble_sculpture.jpg"),
        out=str(tmp_path / "film.mp4"),
    )
    arguments = [f"--{key}={value}" for key, value in (options | change).items()]
    with pytest.raises(SystemExit) as stopped:
        avatar.main(["render", *arguments])
    assert stopped.value.code != 0
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert expected in message
    assert not list(tmp_path.iterdir())


def test_a_portrait_is_the_file_that_was_given(shared_dir):
    """Tracking goes by the name: that of NAME.jpg is not taken for any NAME."""
    given = shared_dir / "real" / "inputs" / "marble_sculpture.jpg"
    assert avatar.find_portrait(str(given)).image.shape == (512, 512, 3)
    with pytest.raises(UserError, match=r"--portrait .*marble_sculpture.png: no such file"):
        avatar.find_portrait(str(given.with_suffix(".png")))


def test_a_portrait_is_taken_from_inputs_alone(tmp_path):
    for folder in ("inputs", "originals"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "me.jpg").touch()
    with pytest.raises(ValueError, match=r"belongs to .*inputs/me\.jpg"):
        avatar.find_portrait(str(tmp_path / "originals" / "me.jpg"))


def test_a_portrait_as_a_phone_names_it(shared_dir, tmp_path):
    real = shared_dir / "real"
    for folder in ("processing", "tracking"):
        (tmp_path / folder).symlink_to(real / folder)
    (tmp_path / "inputs").mkdir()
    portrait = tmp_path / "inputs" / "marble_sculpture.JPG"
    portrait.symlink_to(real / "inputs" / "marble_sculpture.jpg")
    assert avatar.find_portrait(str(portrait)).image.shape == (512, 512, 3)


def test_two_pictures_of_a_name_are_not_taken_for_each_other(tmp_path):
    (tmp_path / "inputs").mkdir()
    for suffix in (".jpg", ".png"):
        (tmp_path / "inputs" / f"me{suffix}").touch()
    with pytest.raises(ValueError, match=r"me\.jpg and me\.png have the same name me"):
        avatar.find_portrait(str(tmp_path / "inputs" / "me.png"))


def test_weights_for_which_the_model_has_no_use_are_named(run, shared_dir, tmp_path, capsys):
    portrait = shared_dir / "real" / "inputs" / "marble_sculpture.jpg"
    command = ["render", "--workdir", str(run), "--portrait", str(portrait), "--dinov2", "no.file"]
    with pytest.raises(SystemExit):
        avatar.main([*command, "--out", str(tmp_path / "orbit.gif")])
    assert "error: --dinov2 no.file: the model of" in capsys.readouterr().err


def test_a_portrait_without_tracking_is_named(run, shared_dir, tmp_path, capsys):
    inputs = tmp_path / "mine" / "inputs"
    inputs.mkdir(parents=True)
    original = shared_dir / "real" / "inputs" / "marble_sculpture.jpg"
    (inputs / "me.jpg").write_bytes(original.read_bytes())
    with pytest.raises(SystemExit):
        avatar.main(
            [
                *("render", "--workdir", str(run), "--portrait", str(inputs / "me.jpg")),
                *("--out", str(tmp_path / "film.mp4")),
            ]
        )
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Pixel3DMM" in message
