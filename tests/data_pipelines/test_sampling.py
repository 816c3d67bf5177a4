"""Which frames make an example: the rules, and the odds."""

import numpy as np
import pytest
from tiny_captures import TinyCaptures

from data_pipelines.index import Index
from data_pipelines.sampling import shuffled, target_candidates
from data_pipelines.shard_writer import write_shards
from data_pipelines.shards import PreparedSet


def index(root, **captures) -> Index:
    write_shards(TinyCaptures(**captures), root)
    return PreparedSet(root / "tiny").index


def draw(index: Index, record: int, targets: int, seed: int, temperature: float = 3.0):
    rng = np.random.default_rng(seed)
    candidates = target_candidates(index, record, targets, temperature, rng)
    return np.array([records[0] for records in candidates])


def test_monocular_targets_are_other_frames_of_the_clip(tmp_path):
    made = index(tmp_path, timesteps=7)
    for seed in range(50):
        record = seed % made.num_frames
        targets = draw(made, record, 5, seed)
        assert {made.clip_of(t) for t in targets} == {made.clip_of(record)}
        assert len({record, *targets}) == 6


def test_short_monocular_clips_repeat_targets(tmp_path):
    made = index(tmp_path, timesteps=3)
    targets = draw(made, 4, 5, seed=0)
    assert set(targets) == {3, 5}


def test_clip_of_a_single_frame_is_its_own_target(tmp_path):
    made = index(tmp_path, timesteps=1)
    assert draw(made, 2, 3, seed=0).tolist() == [2, 2, 2]


def test_multi_view_targets_are_the_inputs_camera_and_distinct_others(tmp_path):
    made = index(tmp_path, timesteps=4, cameras=8)
    seen = set()
    for seed in range(100):
        record = seed % made.num_frames
        targets = draw(made, record, 5, seed)
        assert {made.clip_of(t) for t in targets} == {made.clip_of(record)}
        assert record not in targets
        assert made.camera[targets[0]] == made.camera[record]
        assert len(set(made.camera[targets])) == 5
        seen |= {tuple(made.timestep[targets])}
    assert len(seen) > 50  # each target has a timestep of its own


def test_a_single_multi_view_target_is_of_any_camera(tmp_path):
    made = index(tmp_path, timesteps=4, cameras=8)
    cameras = [made.camera[draw(made, 3, 1, seed)[0]] for seed in range(800)]
    assert np.bincount(cameras, minlength=8).min() > 60


def test_few_cameras_repeat_and_a_single_timestep_gives_the_input_back(tmp_path):
    made = index(tmp_path, timesteps=1, cameras=2)
    targets = draw(made, 2, 5, seed=0)
    assert targets.tolist() == [2, 3, 2, 3, 2]


@pytest.mark.parametrize("cameras", [1, 2])
def test_open_jaws_are_favoured_by_exp_of_temperature_times_angle(tmp_path, cameras):
    """Jaw angles of timesteps 0..4 are 0, 0.1, 0.2, 0.3, 0 radians; the input is timestep 0."""
    made = index(tmp_path, timesteps=5, cameras=cameras)
    temperature, count = 10.0, 4000
    first = [made.timestep[draw(made, 0, 2, seed, temperature)[0]] for seed in range(count)]
    found = np.bincount(first, minlength=5) / count
    weights = np.exp(temperature * np.array([-np.inf, 0.1, 0.2, 0.3, 0]))
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.03)


def test_temperature_zero_favours_nothing(tmp_path):
    made = index(tmp_path, timesteps=5)
    first = [draw(made, 0, 1, seed, temperature=0.0)[0] for seed in range(4000)]
    np.testing.assert_allclose(np.bincount(first, minlength=5)[1:5] / 4000, 0.25, atol=0.03)


def test_candidates_are_disjoint_while_there_are_frames(tmp_path):
    made = index(tmp_path, timesteps=20)
    candidates = target_candidates(made, 0, 3, 3.0, np.random.default_rng(0))
    everything = np.concatenate(candidates)
    assert sorted(everything) == list(range(1, 20))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_shuffle_gives_a_new_permutation_each_epoch(size):
    epochs = [[shuffled(e * size + i, size, seed=5) for i in range(size)] for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size == 1000:
        assert epochs[0] != epochs[1] != epochs[2]
        assert np.abs(np.corrcoef(epochs[0], range(size))[0, 1]) < 0.1


def test_place_in_a_huge_shuffle_needs_no_list():
    size = 200_000_000
    places = {shuffled(i, size, seed=0) for i in range(1000)}
    assert len(places) == 1000
    assert max(places) > 0.99 * size
