"""The benchmark of a large index measures what it says, on a small one."""

import queue
import threading

from etils import epath

from data_pipelines.errors import GIVE_UP
from data_pipelines.index import write_index
from data_pipelines.index_benchmark import main, simulated, use_index


def test_a_worker_maps_the_index_and_does_not_load_it(tmp_path):
    index = simulated(frames=3_000_000, clips=6000)
    write_index(epath.Path(tmp_path), index)
    results = queue.SimpleQueue()
    use_index(epath.Path(tmp_path), 0, threading.Barrier(1), results)
    opened, drawn, own, mapped = results.get()
    size = sum(path.stat().st_size for path in (tmp_path / "index").iterdir())
    assert size < 12 * 3_000_000
    assert own < size / 4
    assert 0 < mapped < 1.1 * size
    assert opened < 10
    assert 0 < drawn < 0.01


def test_numbers_that_make_no_index_are_named(capsys):
    assert main(["--frames=10", "--clips=20"]) == GIVE_UP
    assert "error: expected --frames of at least --clips" in capsys.readouterr().err
