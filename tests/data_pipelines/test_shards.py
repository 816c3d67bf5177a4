"""Shards and their index give back what was written, to TFDS too, or say what is wrong."""

import dataclasses
import pickle
import sys
import threading

import memory_bucket  # noqa: F401 (az:// paths)
import numpy as np
import pytest
from etils import epath
from tiny_captures import TinyCaptures, expression

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.record import FrameError
from data_pipelines.shard_job import jaw_angle
from data_pipelines.shard_writer import write_shards
from data_pipelines.shards import PreparedSet


def test_frames_come_back_as_written(tmp_path):
    captures = TinyCaptures(cameras=2, size=64)
    write_shards(captures, tmp_path, quality=100)
    prepared = PreparedSet(tmp_path / "tiny")
    written = [f for i in range(captures.num_clips) for f in captures.clip(i)]
    assert len(prepared) == len(written) == 40
    for i in (0, 7, 39):
        read = prepared.frame(i)
        for field in dataclasses.fields(read):
            expected, found = getattr(written[i], field.name), getattr(read, field.name)
            if field.name == "image":
                assert np.abs(found.astype(int) - expected).max() <= 4
            else:
                np.testing.assert_array_equal(found, expected)


def test_index_knows_every_frame(tmp_path):
    write_shards(TinyCaptures(cameras=2), tmp_path)
    prepared = PreparedSet(tmp_path / "tiny")
    index = prepared.index
    for i in range(len(prepared)):
        read, clip = prepared.frame(i), index.clip_of(i)
        assert (index.person[clip], index.sequence[clip]) == (read.person, read.sequence)
        assert index.camera_names[index.camera[i]] == read.camera
        assert index.timestep[i] == read.timestep
        assert index.jaw[i] == pytest.approx(0.1 * (read.timestep % 4), abs=1e-6)
    assert index.image_size == 16


def test_tfds_reads_the_folder_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    write_shards(TinyCaptures(), tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "tiny")
    source = builder.as_data_source(split="train")
    prepared = PreparedSet(tmp_path / "tiny")
    assert len(source) == len(prepared)
    ours, theirs = prepared.frame(7), source[7]
    np.testing.assert_array_equal(theirs["mask"][..., 0], ours.mask)
    # Two JPEG decoders may round differently.
    assert np.abs(theirs["image"].astype(int) - ours.image).max() <= 3
    np.testing.assert_array_equal(theirs["cam2head"], ours.cam2head)
    np.testing.assert_array_equal(theirs["expression"], ours.expression)
    assert theirs["person"].decode() == ours.person
    assert "tensorflow" not in sys.modules


def test_missing_and_cut_shards_are_named_at_the_start(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    shard = sorted((tmp_path / "tiny").glob("*.array_record-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=shard.name):
        PreparedSet(tmp_path / "tiny")
    shard.unlink()
    with pytest.raises(MissingFileError, match=f"{shard.name} is missing: .* prepare it again"):
        PreparedSet(tmp_path / "tiny")


@pytest.mark.parametrize("file", ["index.json", "index/jaw.npy", "settings.json"])
def test_damaged_index_is_named(tmp_path, file):
    write_shards(TinyCaptures(), tmp_path)
    whole = (tmp_path / "tiny" / file).read_bytes()
    (tmp_path / "tiny" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"settings.json of {tmp_path}/tiny is damaged"):
        PreparedSet(tmp_path / "tiny")


def test_flipped_bits_of_the_index_are_found(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    path = tmp_path / "tiny" / "index" / "jaw.npy"
    flipped = bytearray(path.read_bytes())
    flipped[-5] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="is damaged"):
        PreparedSet(tmp_path / "tiny")


def test_threads_share_a_set(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    prepared = PreparedSet(tmp_path / "tiny")
    expected = [prepared.record(i) for i in range(len(prepared))]
    found = [None] * 8
    again = PreparedSet(tmp_path / "tiny")

    def read(thread: int):
        found[thread] = [again.record(i) for i in range(len(again))]

    threads = [threading.Thread(target=read, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f == expected for f in found)


def test_jaw_angle_is_the_opening():
    assert jaw_angle(expression(0.0)) == pytest.approx(0.0, abs=1e-6)
    assert jaw_angle(expression(0.25)) == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(FrameError, match="jaw is no rotation"):
        jaw_angle(np.zeros(135, np.float32))


def test_a_bucket_serves_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXAVATAR_CACHE", str(tmp_path / "cache"))
    write_shards(TinyCaptures(), "az://bucket/data")
    write_shards(TinyCaptures(), tmp_path / "local")
    remote, local = PreparedSet("az://bucket/data/tiny"), PreparedSet(tmp_path / "local" / "tiny")
    assert [remote.record(i) for i in range(20)] == [local.record(i) for i in range(20)]
    assert (epath.Path("az://bucket/data/tiny") / "dataset_info.json").exists()


def test_a_bucket_written_anew_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXAVATAR_CACHE", str(tmp_path / "cache"))
    first = PreparedSet(write_to_bucket("az://other", quality=95)).record(0)
    epath.Path("az://other/tiny").rmtree()
    second = PreparedSet(write_to_bucket("az://other", quality=20)).record(0)
    assert first != second


def write_to_bucket(root: str, quality: int) -> str:
    write_shards(TinyCaptures(), root, quality=quality)
    return f"{root}/tiny"


def test_processes_map_the_index_and_are_not_sent_it(tmp_path):
    write_shards(TinyCaptures(num_clips=64), tmp_path)
    prepared = PreparedSet(tmp_path / "tiny")
    sent = pickle.dumps(prepared)
    assert len(sent) < 1000
    assert pickle.loads(sent).frame(7).person == prepared.frame(7).person
    assert not prepared.index.jaw.flags.owndata  # it lies in the file
