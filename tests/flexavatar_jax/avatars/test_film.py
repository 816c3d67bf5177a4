"""Films: every format gives back the frames written, as they came, whole or not at all."""

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import UserError
from flexavatar_jax.avatars.film import check_film, write_film


def picture(t: int, channels: int = 3) -> np.ndarray:
    """Smooth colours that tell frames and places apart, and (RGBA) a disc on nothing."""
    y, x = np.mgrid[:33, :34] / 33
    layers = [x, y, np.full_like(x, t / 5), ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.15) * 1.0]
    return np.stack(layers[:channels], axis=-1).astype(np.float32)


def read(path):
    """The frames of a film as RGBA."""
    if path.is_dir():
        files = sorted(path.iterdir())
        assert [f.name for f in files] == [f"{i:05d}.png" for i in range(len(files))]
        return np.stack([np.asarray(Image.open(f).convert("RGBA")) for f in files])
    if path.suffix in (".gif", ".apng"):
        film, frames = Image.open(path), []
        for t in range(film.n_frames):
            film.seek(t)
            frames.append(np.asarray(film.convert("RGBA")))
        return np.stack(frames)
    decoder = ["-c:v", "libvpx-vp9"] if path.suffix == ".webm" else []
    reader = imageio_ffmpeg.read_frames(
        str(path), pix_fmt="rgba", bits_per_pixel=32, input_params=decoder
    )
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(b, np.uint8).reshape(height, width, 4) for b in reader])


@pytest.mark.parametrize(
    ("name", "channels", "tolerance"),
    [
        ("film.mp4", 3, 12),
        ("film.gif", 3, 12),
        ("film.webm", 4, 24),
        ("film.apng", 4, 1),
        ("film", 4, 1),
    ],
)
def test_frames_come_back_from_every_format(name, channels, tolerance, tmp_path):
    path = tmp_path / name
    write_film(path, (picture(t, channels) for t in range(5)), fps=10)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    frames = read(path).astype(int)[:, :33, :34]
    assert len(frames) == 5
    for t, frame in enumerate(frames):
        expected = np.round(255 * picture(t, 4)).astype(int)
        if channels == 4:
            assert np.abs(frame[..., 3] - expected[..., 3]).mean() < 6
        inside = expected[..., 3] > 0
        assert np.abs(frame[inside, :3] - expected[inside, :3]).mean() < tolerance


def test_a_film_of_odd_size_gains_a_row_in_mp4(tmp_path):
    write_film(tmp_path / "film.mp4", [picture(0)] * 2, fps=10)
    assert read(tmp_path / "film.mp4").shape[1:3] == (34, 34)


def test_frames_are_written_as_they_come(tmp_path):
    """The second frame is asked for when the first is on its way: none are collected."""
    asked = []

    def frames():
        for t in range(6):
            asked.append(t)
            yield picture(t % 5)
            if t < 5:
                assert len(asked) == t + 1

    write_film(tmp_path / "film.gif", frames(), fps=10)
    assert asked == list(range(6))


@pytest.mark.parametrize("name", ["film.mp4", "film"])
def test_a_film_that_fails_half_way_leaves_nothing(name, tmp_path):
    def frames():
        yield picture(0)
        raise UserError("the second frame is missing")

    with pytest.raises(UserError, match="second frame"):
        write_film(tmp_path / name, frames(), fps=10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ("[out#0/mp4 @ 0x55d2] Error writing trailer: No space left on device", "No space left on"),
        (
            "[out#0/mp4 @ 0x55d2] Error writing trailer: Bad day",
            "ffmpeg: Error writing trailer: Bad",
        ),
    ],
)
def test_an_ffmpeg_that_fails_after_the_last_frame_is_no_film(
    told, sentence, tmp_path, monkeypatch
):
    """As on a full disk: it has taken all frames by then, and left a file without an index."""
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(f"#!/bin/sh\nfor out; do :; done\ncat > $out\necho '{told}' >&2\nexit 1\n")
    ffmpeg.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(ffmpeg))
    with pytest.raises(
        UserError, match=rf"film\.mp4 cannot be written \({sentence}.*\); make room"
    ):
        write_film(tmp_path / "film.mp4", [picture(0)] * 3, fps=10)
    assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]


def test_no_frames_are_no_film(tmp_path):
    with pytest.raises(UserError, match="there are no frames"):
        write_film(tmp_path / "film.mp4", iter([]), fps=10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "transparent", "sentence"),
    [
        ("film.avi", False, r"must end in \.mp4, \.gif, \.webm, \.apng, or a name without"),
        ("film.mp4", True, r"\.mp4 knows no transparency; write \.webm"),
        ("no/such/film.mp4", False, "there is no folder .*no/such; create it"),
        (".", False, "is a folder with something in it"),
        ("there", False, "is a file; give another name"),
    ],
)
def test_a_film_that_cannot_be_written_is_named_before_the_work(
    name, transparent, sentence, tmp_path
):
    (tmp_path / "there").touch()
    with pytest.raises(UserError, match=sentence):
        check_film(tmp_path / name, transparent=transparent)
