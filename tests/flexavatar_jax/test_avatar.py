"""The command: avatars of real portraits and of prepared people, kept, driven, filmed."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.pixel3dmm import read_driving
from flexavatar_jax import avatar
from flexavatar_jax.avatars.avatar_file import load_avatar, save_avatar

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def _compiled_once(rule_run, loaded, monkeypatch):
    """The run is restored, and its programs are compiled, once for all of these tests."""
    real = avatar.load_model
    monkeypatch.setattr(
        avatar,
        "load_model",
        lambda workdir, *rest: loaded if workdir == str(rule_run) else real(workdir, *rest),
    )


@pytest.fixture(scope="module")
def real(shared_dir):
    return shared_dir / "real"


@pytest.fixture(scope="module")
def person(tiny_data):
    """A person of a prepared set, as the command is given one."""
    return f"{tiny_data}/procedural_test/test_00000"


def run(command, *arguments):
    avatar.main([command, *map(str, arguments)])


def pictures(folder):
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())]) / 255


@pytest.fixture(scope="module")
def kept(rule_run, person, tmp_path_factory):
    """An .avatar file of a prepared person; the command restores the run itself."""
    path = tmp_path_factory.mktemp("kept") / "anna.avatar"
    run("create", person, "--workdir", rule_run, "--out", path)
    return path


def test_an_avatar_is_what_the_encoder_makes_of_the_portrait(kept, rule_run, capsys):
    found = load_avatar(kept)
    assert found.name == "test_00000"
    assert not found.offsets.any()
    run("info", kept)
    said = capsys.readouterr().out
    assert "name: test_00000" in said
    assert "step: 7" in said
    assert "fitted: no" in said


def test_a_real_portrait_turns_all_the_way_round(rule_run, real, tmp_path):
    portrait = real / "inputs" / "marble_sculpture.jpg"
    run("render", portrait, "--workdir", rule_run, "--frames", 4, "--out", tmp_path / "orbit")
    views = pictures(tmp_path / "orbit")
    assert views.shape == (4, 24, 24, 3)
    for view in views[1:]:
        assert np.abs(view - views[0]).max() > 0.05


def test_a_performance_moves_the_face_and_not_the_camera(rule_run, animator, real, tmp_path):
    """Each frame of the film is the driver's expression before the portrait's own camera."""
    driving = tmp_path / "clip"
    driving.mkdir()
    for number, frame in enumerate((0, 10, 40)):
        original = real / "driving" / "EMO-1-shout+laugh" / f"{frame:05d}.frame"
        (driving / f"{number:05d}.frame").symlink_to(original)
    portrait = real / "inputs" / "asian_watercolor_girl.jpg"
    run("create", portrait, "--workdir", rule_run, "--out", tmp_path / "girl.avatar")
    (tmp_path / "girl.avatar").rename(tmp_path / "renamed.avatar")
    command = ("--workdir", rule_run, "--driving", driving)
    run("render", tmp_path / "renamed.avatar", *command, "--out", tmp_path / "driven")
    run("render", "--portrait", portrait, *command, "--out", tmp_path / "on_the_way")
    film = pictures(tmp_path / "driven")
    np.testing.assert_array_equal(film, pictures(tmp_path / "on_the_way"))
    girl = load_avatar(tmp_path / "renamed.avatar")
    expected = animator.render(girl.code, read_driving(driving).expression, girl.cam2head, girl.K)
    np.testing.assert_allclose(film, expected, atol=1 / 255)
    assert np.abs(film[1] - film[0]).max() > 0.05


def test_another_avatar_drives_and_several_stand_beside_the_driver(
    rule_run, kept, tiny_data, tmp_path
):
    driver = f"{tiny_data}/procedural_monocular/" + _first_person(
        tiny_data / "procedural_monocular"
    )
    run(
        "render",
        kept,
        kept,
        "--workdir",
        rule_run,
        "--driving",
        driver,
        "--beside",
        "--size",
        20,
        "--out",
        tmp_path / "film",
    )
    film = pictures(tmp_path / "film")
    assert film.shape == (3, 20, 60, 3)
    np.testing.assert_array_equal(film[:, :, 20:40], film[:, :, 40:])
    assert np.abs(film[:, :, :20] - film[:, :, 20:40]).max() > 0.1
    run("create", driver, "--workdir", rule_run, "--out", tmp_path / "driver.avatar")
    run(
        "render",
        kept,
        "--workdir",
        rule_run,
        "--driving",
        tmp_path / "driver.avatar",
        "--size",
        20,
        "--out",
        tmp_path / "by_file",
    )
    np.testing.assert_array_equal(pictures(tmp_path / "by_file"), film[:, :, 40:])


def _first_person(folder):
    from data_pipelines.shards import PreparedSet

    return str(PreparedSet(folder).index.person[0])


def test_a_camera_path_and_a_background_are_followed(rule_run, kept, tmp_path):
    found = load_avatar(kept)
    path = tmp_path / "path.json"
    path.write_text(json.dumps({"cam2head": [found.cam2head.tolist()] * 2}))
    run(
        "render",
        kept,
        "--workdir",
        rule_run,
        "--camera",
        path,
        "--background",
        "#ff0000",
        "--out",
        tmp_path / "red",
    )
    run(
        "render",
        kept,
        "--workdir",
        rule_run,
        "--camera",
        "still",
        "--background",
        "transparent",
        "--out",
        tmp_path / "clear",
    )
    red, clear = pictures(tmp_path / "red"), pictures(tmp_path / "clear")
    assert len(red) == 2
    assert len(clear) == 1
    alpha = clear[..., 3:]
    np.testing.assert_allclose(red[:1], clear[..., :3] * alpha + (1 - alpha) * [1, 0, 0], atol=0.02)


def test_a_fit_writes_its_progress_and_several_people_a_file_each(rule_run, tiny_data, tmp_path):
    folder = tiny_data / "procedural_test"
    how = ["--people", "all", "--images", "2", "--fit", "3"]
    run("create", folder, *how, "--workdir", rule_run, "--out", tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"test_0000{i}{end}" for i in (0, 1) for end in (".avatar", ".fit.png")]
    found = load_avatar(tmp_path / "test_00001.avatar")
    assert found.notes["fit_steps"] == 3
    assert found.offsets.any()
    with Image.open(tmp_path / "test_00001.fit.png") as strip:
        assert strip.height == 2 * 24


def test_the_way_from_one_to_another_begins_and_ends_with_them(rule_run, kept, tiny_data, tmp_path):
    other = tmp_path / "other.avatar"
    run("create", f"{tiny_data}/procedural_test/test_00001", "--workdir", rule_run, "--out", other)
    pair = (kept, other, "--workdir", rule_run)
    run("interpolate", *pair, "--frames", 5, "--out", tmp_path / "way")
    way = pictures(tmp_path / "way")
    assert len(way) == 5
    run("render", kept, "--workdir", rule_run, "--camera", "still", "--out", tmp_path / "start")
    np.testing.assert_array_equal(way[0], pictures(tmp_path / "start")[0])
    ends = np.abs(way[4] - way[0]).mean()
    assert 0 < np.abs(way[1] - way[0]).mean() < ends
    corners = (kept, other, other, kept, "--workdir", rule_run)
    run("interpolate", *corners, "--grid", 3, "--frames", 1, "--out", tmp_path / "grid")
    (grid,) = pictures(tmp_path / "grid")
    np.testing.assert_array_equal(grid[:24, :24], way[0])
    np.testing.assert_array_equal(grid[:24, :24], grid[48:, 48:])


MARBLE = "inputs/marble_sculpture.jpg"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(avatars=["nobody/inputs/nobody.jpg"]), "nobody/inputs/nobody.jpg: no such file"),
        (dict(avatars=["nobody.avatar"]), "nobody.avatar cannot be read"),
        (dict(avatars=[]), "there is no avatar; give an .avatar file"),
        (dict(out="film.avi"), "must end in .mp4"),
        (dict(out="no/such/folder/film.mp4"), "no/such/folder"),
        (dict(workdir="nowhere"), "nowhere"),
        (dict(driving="no/performance"), "no/performance"),
        (dict(driving="SET", frames=7), "leave out --frames or --driving"),
        (dict(driving="SET", camera="orbit", pose="kept"), "--pose kept is the driver's"),
        (dict(beside=True), "--beside shows the pictures that drive"),
        (dict(size=-4), "--size is -4; expected 1 to"),
        (dict(size=10**6), "--size is 1000000; expected 1 to"),
        (dict(frames=0), "--frames is 0; expected 1 to"),
        (dict(backend="metal"), "backend is 'metal'; expected 'auto' or one of"),
        (dict(background="reddish"), "--background is 'reddish'; expected white"),
        (dict(background="transparent"), ".mp4 knows no transparency"),
        (dict(camera="nowhere.json"), "nowhere.json cannot be read"),
        (dict(dinov2="no.file"), "--dinov2 no.file: the model of"),
    ],
)
def test_mistakes_are_named_in_one_sentence(
    change, sentence, rule_run, person, kept, tmp_path, capsys
):
    options = dict(avatars=[kept], workdir=rule_run, out=tmp_path / "film.mp4") | change
    if options.get("driving") == "SET":
        options["driving"] = person
    arguments = [str(a) for a in options.pop("avatars")]
    for key, value in options.items():
        arguments.append(f"--{key}" if value is True else f"--{key}={value}")
    assert sentence in refused(["render", *arguments], capsys)
    assert not list(tmp_path.iterdir())


def refused(arguments, capsys):
    """The one sentence that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        avatar.main(arguments)
    assert stopped.value.code != 0
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    return message


def test_an_avatar_of_another_checkpoint_is_refused(kept, rule_run, tmp_path, capsys):
    other = dataclasses.replace(load_avatar(kept), checkpoint="0" * 32)
    save_avatar(tmp_path / "other.avatar", other)
    message = refused(
        [
            "render",
            str(tmp_path / "other.avatar"),
            "--workdir",
            str(rule_run),
            "--out",
            str(tmp_path / "a.mp4"),
        ],
        capsys,
    )
    assert "other.avatar belongs to another checkpoint (made at step 7)" in message
    assert not (tmp_path / "a.mp4").exists()


def test_an_avatar_that_claims_a_checkpoint_of_other_codes_is_refused(
    kept, rule_run, tmp_path, capsys
):
    forged = dataclasses.replace(load_avatar(kept), code=np.zeros((4, 3), np.float32))
    save_avatar(tmp_path / "forged.avatar", forged)
    files = [str(kept), str(tmp_path / "forged.avatar")]
    message = refused(
        ["interpolate", *files, "--workdir", str(rule_run), "--out", str(tmp_path / "a.mp4")],
        capsys,
    )
    assert (
        "forged.avatar is damaged: its code is [4, 3], and its checkpoint's are [16, 48]" in message
    )
    assert not (tmp_path / "a.mp4").exists()


def test_what_a_stranger_wrote_does_not_steer_the_terminal(kept, tmp_path, capsys):
    notes = {"\x1b[2J" + "n" * 999: 1, "by": "\x1b]0;me\x07\nerror: none"}
    odd = dataclasses.replace(load_avatar(kept), name="anna\x1b[31m", notes=notes)
    save_avatar(tmp_path / "odd.avatar", odd)
    run("info", tmp_path / "odd.avatar")
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "anna\\x1b[31m" in said
    assert max(map(len, said.splitlines())) < 260
    assert "no such file" in refused(
        ["create", "\x1b[2J", "--workdir", ".", "--out", str(tmp_path / "a.avatar")], capsys
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["SET"], "is a prepared data set; give SET/PERSON, such as"),
        (["SET/nobody"], "has no person nobody; it has 2, such as test_00000"),
        (["SET/test_00000", "SET/test_00001"], "give no other source beside it"),
        (["SET/test_00000", "--images=1000"], "fewer than --images 1000"),
        (["SET/test_00000", "--images=0"], "--images is 0"),
        (["SET/test_00000", "--fit=5", "--batch=2"], "--batch is 2; expected 1 to 1"),
        (["SET/test_00000", "--out=me.txt"], "must end in .avatar"),
        (["SET", "--people=all", "--out=no/folder"], "must be a folder, which exists"),
        (["SET/test_00000", "--fit=5", "--sam2=no.safetensors"], "no.safetensors"),
    ],
)
def test_sources_that_make_no_avatar_are_named(
    arguments, sentence, tiny_data, rule_run, tmp_path, capsys
):
    arguments = [a.replace("SET", f"{tiny_data}/procedural_test") for a in arguments]
    command = [
        "create",
        "--workdir",
        str(rule_run),
        "--out",
        str(tmp_path / "a.avatar"),
        *arguments,
    ]
    assert sentence in refused(command, capsys)
    assert not list(tmp_path.iterdir())


def test_a_portrait_without_tracking_is_named(rule_run, real, tmp_path, capsys):
    inputs = tmp_path / "mine" / "inputs"
    inputs.mkdir(parents=True)
    (inputs / "me.jpg").write_bytes((real / MARBLE).read_bytes())
    command = ["create", "--workdir", str(rule_run), "--out", str(tmp_path / "me.avatar")]
    assert "Pixel3DMM" in refused([*command, str(inputs / "me.jpg")], capsys)
    (inputs / "me.jpg").rename(tmp_path / "me.jpg")
    assert "inputs/ with processing/ and tracking/" in refused(
        [*command, str(tmp_path / "me.jpg")], capsys
    )
