"""An index comes back as it was written, in as few bytes as hold it."""

import dataclasses

import numpy as np
import pytest
from etils import epath

from data_pipelines.index import index_version, read_index, write_index
from data_pipelines.index_benchmark import simulated


@pytest.mark.parametrize(
    ("timesteps", "dtype"),
    [
        ((0, 255), np.uint8),
        ((0, 256), np.uint16),
        ((-1, 3), np.int16),
        ((5, 1 << 31), np.uint32),
    ],
)
def test_whole_numbers_come_back_in_the_smallest_type_that_holds_them(tmp_path, timesteps, dtype):
    index = simulated(frames=8, clips=2)
    timestep = np.resize(np.array(timesteps, np.int64), 8)
    write_index(epath.Path(tmp_path), dataclasses.replace(index, timestep=timestep))
    found = read_index(epath.Path(tmp_path), index_version(epath.Path(tmp_path)).hex())
    assert found.timestep.dtype == dtype
    np.testing.assert_array_equal(found.timestep, timestep)
    np.testing.assert_array_equal(found.record_end, index.record_end)
    np.testing.assert_array_equal(found.jaw, index.jaw)
