"""Where a record lies in a shard, as it is asked for from a bucket."""

from __future__ import annotations

import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipelines import ranges


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
