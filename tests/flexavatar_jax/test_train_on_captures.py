"""configs/flex1.py, shrunk, trains on every kind of capture that can be prepared."""

import json

import look_alikes
import numpy as np
import pytest
from multi_view_sets import write_ava256, write_cafca, write_nersemble
from test_tracked_videos import PHOTOS, track, write_celebv, write_vfhq

from configs import flex1
from data_pipelines import prepare
from data_pipelines.mixture import make_iterator
from flexavatar_jax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_hello3(root):
    look_alikes.write_video(root / "videos/0001.mp4", PHOTOS)
    track(root, "0001", count=5)


LOOK_ALIKES = {
    "nersemble": write_nersemble,
    "ava256": write_ava256,
    "cafca": write_cafca,
    "celebv_hq": lambda root: write_celebv(
        root, "celebvhq_info.json", "downloaded_celebvhq/processed"
    ),
    "celebv_text": lambda root: write_celebv(
        root, "celebvtext_info.json", "downloaded_celebvtext/processed"
    ),
    "hello3": write_hello3,
    "vfhq_test": lambda root: write_vfhq(root, "Clip+a+P0+C0+F0-3", 3, size=64),
}


@pytest.fixture(scope="module")
def captures(tmp_path_factory, shared_dir):
    """All look-alikes and the real portraits, prepared into one folder."""
    out = tmp_path_factory.mktemp("prepared")
    sources = {"folder": shared_dir / "real"}
    for name, write in LOOK_ALIKES.items():
        sources[name] = tmp_path_factory.mktemp(name)
        write(sources[name])
    for name, source in sources.items():
        argv = [name, "--source", str(source), "--out", str(out), "--workers", "1"]
        assert prepare.main(argv) == 0
    return out


def test_one_step_on_a_batch_of_every_data_set(captures, tmp_path):
    names = sorted([*LOOK_ALIKES, "folder"])
    config = flex1.get_config()
    config.batch, config.steps = len(names), 1
    config.model.update(
        dict(
            image_size=64,
            width=64,
            encoder_depth=1,
            decoder_depth=1,
            head_resolution=4,
            upsampler_channels=(16, 8),
            uv_resolution=32,
            gaussian_resolution=32,
            dino=False,
        )
    )
    config.data.update(dict(root=str(captures), targets=1, workers=0))
    with config.unlocked():
        config.data.mixture = dict.fromkeys(names, 1.0)
    config.loss.update(dict(dino=0.0, sam=0.0))

    batch = next(make_iterator(config.data, config.seed, config.batch))
    assert sorted(batch.example[:, 0]) == list(range(len(names)))
    assert sorted(batch.source) == [0] * 5 + [1] * 3

    assert train(config, tmp_path) == 0
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(line)["loss"])
    assert json.loads(line)["skipped"] == 0
