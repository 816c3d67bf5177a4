"""The benchmark's table and JSON, and what it counts."""

import argparse
import json

import jax
import numpy as np
import pytest

from kernels import backends, binning, rasterizer, rendering
from kernels.bench import benchmark, peers, scenes, tpu_costs
from kernels.bench.scenes import Scene
from kernels.ply import GaussianCloud, write_ply

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_table_and_json_are_written_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--backend", "xla", "--scene", "sparse", "--gaussians", "200", "--size", "32"]
    arguments += ["--images", "2", "--repeats", "1", "--json", str(path)]
    assert benchmark.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text())
    measured, *predicted = rows
    assert measured["backend"] == "xla"
    assert measured["device"] == jax.devices()[0].device_kind
    assert (measured["images"], measured["gaussians"], measured["predicted"]) == (2, 200, False)
    assert measured["forward_backward_ms"] > measured["limit_ms"] > 0
    slowdown = measured["automatic_ms"] / measured["forward_backward_ms"]
    assert measured["automatic_slowdown"] == pytest.approx(slowdown)
    assert {row["device"] for row in predicted} == {"TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"}
    assert all(row["predicted"] for row in predicted)
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[-5:]] == ["xla"] + ["pallas_tpu"] * 4
    assert all(line.endswith("predicted") for line in lines[-4:])


@pytest.mark.parametrize("num", [300, 2000])
def test_there_are_scenes_on_both_sides_of_a_size_that_lists_are_sorted_at(num):
    arguments = argparse.Namespace(images=2, size=64, gaussians=num)
    tile = backends.choose_backend("auto").tile
    automatic = binning.default_capacity(num, width=64, height=64, tile=tile)

    def needed(scene):
        splats = rasterizer.project(*scene[:4], *scene[5:], width=64, height=64)
        return rendering.count_slots(splats, width=64, height=64, tile=tile)

    below, above = (needed(benchmark.load_scene(name, arguments)) for name in ("below", "above"))
    edge = next(automatic >> k for k in range(20) if automatic >> k <= above)
    assert 0.95 * edge < below <= edge < above < 1.05 * edge


def test_work_is_counted_from_the_tiles_that_splats_reach():
    """One Gaussian, a pixel wide, in the middle of one of four tiles."""
    scene = Scene(
        *(np.float32(a) for a in ([[0, 0, 1]], [[1, 0, 0, 0]], [[0.1] * 3], [0.9], [[1, 1, 1]])),
        viewmats=np.eye(4, dtype=np.float32)[None],
        Ks=np.float32([[[10, 0, 4], [0, 10, 4], [0, 0, 1]]]),
    )
    bytes_, operations = benchmark.count_work(scene, 16)
    channels = 4
    assert operations == 64 * (22 + 52 + 6 * channels)
    assert bytes_ == 3 * 4 * 14 + 2 * 4 * (6 + channels) + 2 * 4 * 256 * (channels + 1)


def test_every_tile_that_large_splats_reach_is_counted():
    """1,200 Gaussians that each cover all of 144x144: many more than a guess has room for."""
    num, size = 1200, 144
    scene = Scene(
        np.float32([[0, 0, 1]]).repeat(num, 0), np.float32([[1, 0, 0, 0]]).repeat(num, 0),
        np.full((num, 3), 9, np.float32), np.full(num, 0.5, np.float32),
        np.ones((num, 1), np.float32), np.eye(4, dtype=np.float32)[None],
        np.float32([[[size, 0, size / 2], [0, size, size / 2], [0, 0, 1]]]),
    )  # fmt: skip
    _, operations = benchmark.count_work(scene, size)
    assert operations == num * size * size * (22 + 52 + 6 * 2)
    assert tpu_costs.count_lists(scene, size, size).intersections == num * (size / 16) ** 2


def test_a_ply_is_a_scene_seen_whole(tmp_path):
    rng = np.random.default_rng(0)
    means, quats = rng.normal([3, 4, 5], 1, (500, 3)), rng.normal(size=(500, 4))
    path = tmp_path / "ball.ply"
    write_ply(
        path,
        GaussianCloud(means, quats, np.full((500, 3), 0.01), np.full(500, 0.5), np.ones((500, 3))),
    )
    arguments = argparse.Namespace(images=3, size=64, gaussians=None)
    scene = benchmark.load_scene(str(path), arguments)
    points = np.einsum("cij,nj->cni", scene.viewmats[:, :3, :3], scene.means)
    points = points + scene.viewmats[:, None, :3, 3]
    pixels = np.einsum("cij,cnj->cni", scene.Ks, points)
    pixels = pixels[..., :2] / pixels[..., 2:]
    assert np.mean(((pixels > 0) & (pixels < 64)).all(-1)) > 0.9


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ("forest", "expected avatar, dense, sparse, below, above or a .ply"),
        ("gone.ply", "gone.ply: no such"),
    ],
)
def test_scenes_that_do_not_exist_are_an_error_in_a_sentence(scene, message, capsys):
    assert benchmark.main(["--backend", "xla", "--scene", scene]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images is 0; expected 1 or more"),
        (["--json", "gone/rows.json"], "--json gone/rows.json: no such folder gone"),
        (["--json", "/proc/rows.json"], "--json /proc/rows.json: cannot be written ("),
        (["--json", "/proc"], "--json /proc: it is a folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


def test_rows_that_cannot_be_written_in_the_end_are_an_error_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(OSError, match=r"--json .*rows.json: cannot be written \("):
        benchmark.write_json(tmp_path / "rows.json", [])


def test_backends_for_other_devices_are_named_and_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(backends, "PREFERENCE", {})
    for measured in ("measure_bandwidth", "measure_rate"):
        monkeypatch.setattr(benchmark, measured, lambda: 1e9)
    arguments = ["--backend", "pallas_tpu", "--scene", "sparse", "--gaussians", "9", "--size", "16"]
    assert benchmark.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "pallas_tpu: not measured: it is not made for" in err
    assert out.splitlines()[-1].endswith("predicted")


def test_peers_that_cannot_run_say_why():
    for name in peers.PEERS:
        reason = peers.unavailable(name)
        assert reason is None or "pip install" in reason or "GPU" in reason


def test_scenes_are_as_described_and_the_same_every_time():
    avatar = scenes.avatar(images=2)
    assert avatar.means.shape == (2, 58_361, 3)
    assert abs(np.median(avatar.scales) - 0.0012) < 2e-5
    assert avatar.scales.max() <= 0.01
    assert abs(np.std(np.log(avatar.scales)) - 0.5) < 0.01
    assert 0.1 <= avatar.opacities.min() < avatar.opacities.max() <= 0.95
    assert not np.array_equal(avatar.means[0], avatar.means[1])
    jax.tree.map(np.testing.assert_array_equal, avatar, scenes.avatar(images=2))
