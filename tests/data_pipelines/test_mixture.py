"""The stream of batches depends on (config, seed, step) alone, and is mixed exactly as asked."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain import checkpoint as grain_checkpoint
from ml_collections import ConfigDict
from tiny_captures import TinyCaptures

from data_pipelines.batch import Batch
from data_pipelines.errors import UserError
from data_pipelines.mixture import make_iterator
from data_pipelines.proportions import Proportions
from data_pipelines.shard_writer import write_shards


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(TinyCaptures("mono", num_clips=6, timesteps=7), root)
    write_shards(TinyCaptures("multi", num_clips=3, timesteps=4, cameras=6), root)
    return root


def config(root: Path, **changes) -> ConfigDict:
    return ConfigDict(
        {
            "root": str(root),
            "mixture": {"mono": 0.25, "multi": 0.75},
            "image_size": 16,
            "targets": 3,
            "jaw_temperature": 3.0,
            "jitter": {
                "probability": 0.8,
                "brightness": (0.6, 1.5),
                "contrast": (0.6, 2.5),
                "saturation": (0.5, 2.5),
                "hue": (-0.1, 0.1),
            },
            "bad_records": "raise",
            "max_bad_fraction": 0.0,
            "workers": 0,
            **changes,
        }
    )


def take(iterator, steps: int) -> list[Batch]:
    return [next(iterator) for _ in range(steps)]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name, field, same in zip(batch._fields, batch, other, strict=True):
            np.testing.assert_array_equal(field, same, err_msg=name)


def test_batch_has_the_agreed_arrays(root):
    batch = next(make_iterator(config(root), seed=0, global_batch=8))
    B, T, H = 8, 3, 16
    assert {name: (value.shape, str(value.dtype)) for name, value in batch._asdict().items()} == {
        "input_image": ((B, H, H, 3), "uint8"),
        "input_mask": ((B, H, H), "uint8"),
        "input_cam2head": ((B, 4, 4), "float32"),
        "input_K": ((B, 3, 3), "float32"),
        "target_image": ((B, T, H, H, 3), "uint8"),
        "target_mask": ((B, T, H, H), "uint8"),
        "target_cam2head": ((B, T, 4, 4), "float32"),
        "target_K": ((B, T, 3, 3), "float32"),
        "target_expression": ((B, T, 135), "float32"),
        "background": ((B, 3), "float32"),
        "jitter": ((B, 4), "float32"),
        "jittered": ((B,), "bool"),
        "source": ((B,), "int32"),
        "example": ((B, 2 + T), "int32"),
        "bad_records": ((B,), "int32"),
    }
    assert batch.source.tolist() == batch.example[:, 0].tolist()  # mono is 0, multi is 1


def test_jitter_is_drawn_in_range_and_for_multi_view_captures_only(root):
    batches = take(make_iterator(config(root, targets=1), seed=0, global_batch=40), 4)
    jitter, jittered, source = (
        np.concatenate([getattr(b, name) for b in batches])
        for name in ("jitter", "jittered", "source")
    )
    assert (jitter >= [0.6, 0.6, 0.5, -0.1]).all()
    assert (jitter <= [1.5, 2.5, 2.5, 0.1]).all()
    assert not jittered[source == 0].any()
    assert jittered[source == 1].mean() == pytest.approx(0.8, abs=0.1)


def test_seed_decides_the_stream(root):
    stream = [take(make_iterator(config(root), seed=s, global_batch=4), 3) for s in (1, 1, 2)]
    assert_same(stream[0], stream[1])
    assert any((a.example != b.example).any() for a, b in zip(stream[0], stream[2], strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_disjoint_parts_whose_union_is_the_single_stream(root, hosts):
    single = take(make_iterator(config(root), seed=3, global_batch=8), 6)
    parts = [
        take(make_iterator(config(root), 3, 8, process_index=h, process_count=hosts), 6)
        for h in range(hosts)
    ]
    joined = [
        Batch(*map(np.concatenate, zip(*(part[step] for part in parts), strict=True)))
        for step in range(6)
    ]
    assert_same(single, joined)


def test_two_processes_read_disjoint_parts_whose_union_is_the_single_stream(root):
    program = """
import json, sys
from ml_collections import ConfigDict
from data_pipelines.mixture import make_iterator
config = ConfigDict(json.loads(sys.argv[1]))
part = make_iterator(config, 3, 8, process_index=int(sys.argv[2]), process_count=2)
print(json.dumps([next(part).example.tolist() for _ in range(6)]))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, config(root).to_json(), str(i)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        for i in range(2)
    ]
    halves = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    single = [b.example.tolist() for b in take(make_iterator(config(root), 3, 8), 6)]
    assert [a + b for a, b in zip(*halves, strict=True)] == single


def test_worker_processes_do_not_change_the_stream(root):
    alone = make_iterator(config(root), seed=4, global_batch=4)
    shared = make_iterator(config(root), seed=4, global_batch=4, workers=2)
    assert_same(take(alone, 7), take(shared, 7))
    state = shared.get_state()
    shared.close()
    after = make_iterator(config(root), seed=4, global_batch=4)
    after.set_state(state)
    assert_same(take(alone, 2), take(after, 2))


def test_twenty_restarts_at_random_moments_do_not_change_the_stream(root):
    few = config(root, targets=1)
    expected = take(make_iterator(few, seed=5, global_batch=2), 40)
    rng, found, state = np.random.default_rng(0), [], {"step": 0}
    for _ in range(20):
        iterator = make_iterator(few, seed=5, global_batch=2)
        iterator.set_state(json.loads(json.dumps(state)))
        found += take(iterator, int(rng.integers(0, 3)))
        state = iterator.get_state()
        take(iterator, int(rng.integers(0, 3)))  # done after the last checkpoint, and lost
        iterator.close()
    assert 10 < len(found) <= 40
    assert_same(expected[: len(found)], found)


def train_and_log(data: dict, log: Path) -> None:
    """Stands for a training run: appends the examples of each step, from where the log ends."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines))  # a torn last line did not happen
    batches = make_iterator(ConfigDict(data), seed=6, global_batch=4)
    batches.set_state({"step": len(lines)})
    with log.open("a", buffering=1) as f:
        while True:
            f.write(json.dumps(next(batches).example.tolist()) + "\n")


@pytest.mark.slow
def test_twenty_killed_runs_give_the_ids_of_one_never_killed(root, tmp_path):
    """Real kills, at random moments after the run has got under way again."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["data_pipelines.mixture"])
    log, rng = tmp_path / "log", np.random.default_rng(0)
    for _ in range(20):
        before = log.stat().st_size if log.exists() else 0
        run = server.Process(target=train_and_log, args=(config(root).to_dict(), log))
        run.start()
        while not (log.exists() and log.stat().st_size > before):
            assert run.is_alive() or run.exitcode is None
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        run.kill()
        run.join()
    found = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    assert len(found) >= 20
    batches = make_iterator(config(root), seed=6, global_batch=4)
    assert found == [next(batches).example.tolist() for _ in found]


def test_workers_outlive_signals_to_the_job_but_not_their_run(root):
    program = """
import json, multiprocessing, sys
from ml_collections import ConfigDict
from data_pipelines.mixture import make_iterator
if __name__ == "__main__":
    batches = make_iterator(ConfigDict(json.loads(sys.argv[1])), seed=0, global_batch=4, workers=1)
    for line in sys.stdin:
        print(next(batches).example[0, 0], multiprocessing.active_children()[0].pid, flush=True)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", program, config(root).to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    ask = functools.partial(print, "next", file=run.stdin, flush=True)
    ask()
    worker = int(run.stdout.readline().split()[1])
    os.kill(worker, signal.SIGTERM)
    for _ in range(8):  # more than is read ahead
        ask()
        assert int(run.stdout.readline().split()[1]) == worker
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 60
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_state_goes_through_an_orbax_checkpoint(root, tmp_path):
    iterator = make_iterator(config(root), seed=7, global_batch=4)
    take(iterator, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain_checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = take(iterator, 2)
        other = make_iterator(config(root), seed=7, global_batch=4)
        manager.restore(3, args=ocp.args.Composite(data=grain_checkpoint.CheckpointRestore(other)))
    assert_same(expected, take(other, 2))
    assert len(json.dumps(iterator.get_state())) < 1000


def test_every_frame_is_an_input_once_an_epoch(root):
    iterator = make_iterator(config(root, mixture={"mono": 1.0}), seed=8, global_batch=42)
    epochs = [next(iterator).example[:, 1].tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(42))
    assert epochs[0] != epochs[1]


def test_mixing_does_not_change_a_data_sets_own_stream(root):
    alone = make_iterator(config(root, mixture={"multi": 1.0}), seed=9, global_batch=12)
    mixed = make_iterator(config(root), seed=9, global_batch=16)
    own, together = next(alone), next(mixed)
    multi = together.example[:, 0] == 1
    np.testing.assert_array_equal(own.example[:, 1:], together.example[multi, 1:])


def test_proportions_are_exact_and_even_all_along():
    weights = {"a": 0.25, "b": 0.2, "c": 0.15, "d": 0.4}
    proportions = Proportions.of(weights)
    assert len(proportions.owner) == 20
    places = [proportions.place(n) for n in range(2000)]
    for number, weight in enumerate(weights.values()):
        ranks = [rank for owner, rank in places if owner == number]
        assert ranks == list(range(int(2000 * weight)))
        counts = np.cumsum([owner == number for owner, _ in places])
        assert np.abs(counts - weight * np.arange(1, 2001)).max() <= 1


def test_proportions_of_decimal_weights_do_not_round():
    assert Proportions.of({"a": 0.1, "b": 0.3}).counts.tolist() == [1, 3]
    assert Proportions.of({"a": 2, "b": 1}).counts.tolist() == [2, 1]
    assert Proportions.of({"a": 1.0}).counts.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mixture": {"mono": -1.0}}, "data.mixture.mono is -1.0"),
        ({"mixture": {"mono": "x"}}, "data.mixture.mono is 'x': expected the data set's weight"),
        ({"mixture": {"mono": True}}, "data.mixture.mono is True: expected"),
        ({"mixture": {"mono": 0.0}}, "no data set a weight"),
        ({"mixture": {"celebrities": 1.0}}, "celebrities holds no finished data set"),
        ({"image_size": 64}, "holds images of 16 pixels"),
        ({"bad_records": "ignore"}, "data.bad_records is .ignore."),
        ({"targets": 0}, "data.targets is 0"),
    ],
)
def test_mistakes_in_the_config_are_named(root, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        make_iterator(config(root, **changes), seed=0, global_batch=4)


def test_batch_must_divide_among_processes(root):
    with pytest.raises(UserError, match="batch of 5 does not divide among 2"):
        make_iterator(config(root), seed=0, global_batch=5, process_count=2)


def test_a_program_that_ends_without_closing_leaves_no_shared_memory_and_no_warning(root):
    program = """
import json, sys
from ml_collections import ConfigDict
from data_pipelines.mixture import make_iterator
if __name__ == "__main__":
    batches = make_iterator(ConfigDict(json.loads(sys.argv[1])), seed=0, global_batch=4, workers=1)
    kept = [next(batches) for _ in range(3)]
"""
    script = root / "program.py"
    script.write_text(program)
    arguments = [sys.executable, str(script), json.dumps(config(root).to_dict())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    assert "Error" not in done.stderr
