"""Data sets in gs:// and s3:// are read where they lie, be the stores slow or failing now and then.

The stores are emulators on loopback, behind a proxy that counts and fails (`store_servers`).
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import store_servers
from etils.epath import backend
from fsspec.registry import _registry
from ml_collections import ConfigDict
from tiny_captures import TinyCaptures

from data_pipelines import benchmark, buckets, inspection
from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.index import write_index
from data_pipelines.mixture import make_iterator
from data_pipelines.shard_writer import write_shards
from data_pipelines.shards import PreparedSet

CAPTURES = TinyCaptures(num_clips=5, timesteps=4, size=48)


@dataclasses.dataclass(frozen=True)
class Store:
    """A store with `CAPTURES` in it, prepared in two goes; `local` is the same on disk."""

    root: str
    local: Path
    proxy: store_servers.FaultyProxy


@pytest.fixture(scope="module", params=["gs", "s3"])
def written(request, tmp_path_factory):
    make = {"gs": store_servers.google_storage, "s3": store_servers.s3_storage}[request.param]
    root = f"{request.param}://bucket/data"
    local = tmp_path_factory.mktemp("data")
    with make("bucket") as proxy, pytest.MonkeyPatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        environment.setenv("AWS_ACCESS_KEY_ID", "any")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "any")
        environment.setenv("FLEXAVATAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        _forget_file_systems()
        write_shards(dataclasses.replace(CAPTURES, num_clips=3), root)
        for place in (root, local):
            write_shards(CAPTURES, place)
        yield Store(root, local, proxy)
    _forget_file_systems()


def _forget_file_systems() -> None:
    """They live as long as the process, with the address of their server."""
    backend.fsspec_backend._get_filesystem.cache_clear()
    buckets._file_systems.clear()
    for protocol in ("gs", "gcs", "s3"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
        _registry.pop(protocol, None)  # a test that comes later does without gcsfs


@pytest.fixture
def store(written, monkeypatch):
    """The store without faults; what fails is tried again soon."""
    written.proxy.reset()
    monkeypatch.setattr(buckets, "FIRST_WAIT", 1e-3)
    yield written
    written.proxy.reset()


def batches(root, process_count: int = 1, count: int = 3) -> list[np.ndarray]:
    """The fields of some batches, the processes' parts put together."""
    jitter = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), (1, 1))
    config = ConfigDict(
        {
            "root": str(root),
            "mixture": {"tiny": 1.0},
            "targets": 2,
            "image_size": 16,
            "jaw_temperature": 3.0,
            "jitter": {"probability": 0.5, **jitter},
            "bad_records": "raise",
            "max_bad_fraction": 0.0,
            "workers": 0,
        }
    )
    hosts = [
        make_iterator(config, 0, 8, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    found = []
    for _ in range(count):
        found += map(np.concatenate, zip(*(next(host) for host in hosts), strict=True))
    for host in hosts:
        host.close()
    return found


def test_bytes_fetched_are_the_records(store):
    prepared = PreparedSet(f"{store.root}/tiny")
    assert store.proxy.fetched == 0  # opening reads no shard
    used = sum(len(prepared.record(i)) for i in range(len(prepared)))
    assert used <= store.proxy.fetched <= 1.3 * used


def test_what_grew_in_the_store_is_what_grew_on_disk(store):
    there, here = (PreparedSet(f"{root}/tiny") for root in (store.root, store.local))
    for i in range(len(here)):
        assert there.record(i) == here.record(i)


def test_the_same_batches_as_from_disk_whatever_the_hosts(store):
    expected = batches(store.local)
    for process_count in (1, 2, 4):
        found = batches(store.root, process_count, count=1)
        for field, same in zip(found, expected[: len(found)], strict=True):
            np.testing.assert_array_equal(field, same)


def test_a_store_that_fails_and_stalls_gives_the_same_batches(store, monkeypatch):
    monkeypatch.setattr(buckets, "TIME_LIMIT", 0.5)
    store.proxy.failing, store.proxy.stalling = 0.05, 0.03
    for field, same in zip(batches(store.root), batches(store.local), strict=True):
        np.testing.assert_array_equal(field, same)
    assert store.proxy.failed >= 3


def test_a_store_that_stays_away_is_named(store, monkeypatch):
    prepared = PreparedSet(f"{store.root}/tiny")
    monkeypatch.setattr(buckets, "ATTEMPTS", 2)
    monkeypatch.setattr(buckets, "LONGEST_LIMIT", 0.2)
    store.proxy.failing = 1.0
    sentence = rf"{store.root}/tiny/tiny-train\S* cannot be read \(.*\), tried 2 times; .*bucket"
    with pytest.raises(UserError, match=sentence) as caught:
        prepared.record(0)
    assert caught.value.status == TRY_AGAIN
    with pytest.raises(UserError, match=rf"{store.root}/tiny/\S* cannot be read") as caught:
        PreparedSet(f"{store.root}/tiny")
    assert caught.value.status == TRY_AGAIN


@pytest.mark.parametrize("written", ["gs"], indirect=True)
def test_inspect_and_benchmark_take_what_lies_in_a_store(store, tmp_path, capsys):
    assert inspection.main([f"{store.root}/tiny", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.rglob("frames.png"))
    options = ["--batch=2", "--targets=1", "--seconds=0.2"]
    assert benchmark.main([f"{store.root}/tiny", *options]) == 0
    assert "tiny: 20 images" in capsys.readouterr().out


@pytest.mark.parametrize("written", ["gs"], indirect=True)
def test_the_first_batch_of_a_thousand_shards_comes_in_seconds(store, tmp_path):
    """One shard under a thousand names, each answer taking 20 ms."""
    name, count = "tiny-train.array_record-{:05d}", 1000
    write_shards(TinyCaptures(num_clips=1), tmp_path)
    folder = tmp_path / "tiny"
    shard = (folder / name.format(0)).read_bytes()
    index = PreparedSet(folder).index
    repeated = {
        field: np.tile(getattr(index, field), count)
        for field in ("person", "sequence", "source", "camera", "timestep", "jaw", "record_end")
    }
    ends = np.arange(count + 1) * index.num_frames
    sizes = np.tile(index.shard_bytes, count)
    write_index(
        folder,
        dataclasses.replace(
            index, **repeated, clip_start=ends, shard_start=ends, shard_bytes=sizes
        ),
    )
    for path in (folder / "settings.json", folder / "index.json", *folder.glob("index/*")):
        store.proxy.put(f"many/tiny/{path.relative_to(folder)}", path.read_bytes())
    for i in range(count):
        store.proxy.put(f"many/tiny/{name.format(i)}", shard)
    store.proxy.latency = 0.02
    start = time.monotonic()
    found = batches("gs://bucket/many", count=1)
    assert time.monotonic() - start < 20
    assert len(np.unique(found[-2][:, 1:])) > 20  # records from all over
    assert store.proxy.fetched <= 1.3 * store.proxy.asked * max(np.diff(index.record_end))
