"""Data sets in a bucket are read where they lie: the same batches, and hardly a byte too many."""

from __future__ import annotations

import numpy as np
import pytest
from array_record.python import array_record_module
from memory_bucket import MemoryBucket
from ml_collections import ConfigDict
from tiny_captures import TinyCaptures

from data_pipelines import buckets, ranges
from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.mixture import make_iterator
from data_pipelines.shard_writer import write_shards
from data_pipelines.shards import PreparedSet


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXAVATAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "FIRST_WAIT", 1e-4)
    return f"az://{tmp_path.name}"


@pytest.fixture
def failing(monkeypatch):
    """A function that sets the share of requests for records that fail."""
    share, rng, cat_file = 0.0, np.random.default_rng(0), MemoryBucket.cat_file

    def fail_now_and_then(*args, **options):
        if rng.random() < share:
            raise ConnectionError("503, try again later")
        return cat_file(*args, **options)

    def set_share(value):
        nonlocal share
        share = value

    monkeypatch.setattr(MemoryBucket, "cat_file", fail_now_and_then)
    return set_share


def config(root) -> ConfigDict:
    jitter = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), (1, 1))
    return ConfigDict(
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


@pytest.mark.parametrize("size", [1, 40, 5000, 65_536, 65_512, 300_000])
def test_ranges_are_the_records_that_array_record_reads(tmp_path, size):
    """Around the headers of Riegeli's blocks, which may fall anywhere."""
    path, rng = tmp_path / "shard", np.random.default_rng(size)
    records = [rng.bytes(size + i) for i in range(40)]
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    ends = ranges.record_ends(path, 40)
    whole = path.read_bytes()
    fetched = 0

    def read(begin, end):
        nonlocal fetched
        fetched += end - begin
        return whole[begin:end]

    for record, begin, end in zip(records, [ranges.FIRST_RECORD, *ends], ends, strict=False):
        assert ranges._stream(read, begin, end)[-len(record) :] == record
    assert fetched < sum(map(len, records)) * 1.01 + 40 * 80


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_the_same_batches_from_a_bucket_and_no_more_bytes_than_its_records(
    bucket, failing, tmp_path, share
):
    captures = TinyCaptures(num_clips=20, timesteps=3)
    for root in (bucket, tmp_path):
        write_shards(captures, root)
    local = make_iterator(config(tmp_path), seed=0, global_batch=8)
    remote = make_iterator(config(bucket), seed=0, global_batch=8)
    failing(share)
    for _ in range(3):
        for field, same in zip(next(remote), next(local), strict=True):
            np.testing.assert_array_equal(field, same)
    remote.close()

    prepared = PreparedSet(f"{bucket}/tiny")
    MemoryBucket.fetched = 0
    used = sum(len(prepared.record(i)) for i in range(len(prepared)))
    assert used <= MemoryBucket.fetched <= 1.3 * used


def test_a_bucket_that_stays_away_is_named(bucket, failing):
    write_shards(TinyCaptures(), bucket)
    prepared = PreparedSet(f"{bucket}/tiny")
    failing(1.0)
    with pytest.raises(
        UserError, match=r"az://\S*/tiny/tiny-train\S* cannot be read \(503.*tried 6 times"
    ) as caught:
        prepared.record(0)
    assert caught.value.status == TRY_AGAIN
