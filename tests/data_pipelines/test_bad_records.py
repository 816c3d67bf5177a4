"""Whatever is wrong with a record is found and named, and handled as the config says."""

import collections
import dataclasses
import io
import logging
import pickle
import re

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tiny_captures import TinyCaptures, frame

from data_pipelines.errors import UserError
from data_pipelines.mixture import make_iterator
from data_pipelines.record import (
    FIELDS,
    FrameError,
    check_frame,
    decode_frame,
    encode_frame,
    parse_fields,
    serialize_fields,
)
from data_pipelines.shard_writer import write_shards
from data_pipelines.shards import PreparedSet, RecordError

THOUSAND = 1000


@pytest.fixture(scope="module")
def record() -> bytes:
    return encode_frame(frame(size=32))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def fault(record: bytes) -> str:
    """The field that decoding finds at fault, or "none"."""
    try:
        decode_frame(record)
    except FrameError as e:
        return e.field
    return "none"


def with_fields(record: bytes, **changes) -> bytes:
    """The record with other fields, and the checksums of these: a fault of whoever wrote it."""
    return serialize_fields({**parse_fields(record), **changes})


def as_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_whole_record_has_no_fault(record):
    assert fault(record) == "none"


def test_every_flipped_bit_is_found(record):
    bits = 8 * len(record)
    assert bits > THOUSAND
    missed = []
    for bit in range(bits):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << (bit % 8)
        if fault(bytes(flipped)) == "none":
            missed.append(bit)
    assert missed == []


def test_flipped_bit_is_laid_at_the_field_that_holds_it(record, rng):
    for field in FIELDS:
        value = parse_fields(record)[field]
        value = value if isinstance(value, bytes) else value.tobytes()
        if len(value) < 16:  # too short to find in the record
            continue
        start = record.index(value)
        for _ in range(20):
            flipped = bytearray(record)
            flipped[start + rng.integers(len(value))] ^= 1 << rng.integers(8)
            assert fault(bytes(flipped)) == field


def test_every_cut_record_is_found(record):
    assert len(record) > THOUSAND
    assert {fault(record[:n]) for n in range(len(record))} <= {"record", "checksums", *FIELDS}


@pytest.mark.parametrize("field", ["image", "mask"])
def test_images_that_do_not_decode_are_found(record, rng, field):
    whole = parse_fields(record)[field]
    end = len(whole) - 24  # checksums and end markers follow the last pixel
    for _ in range(THOUSAND):
        cut = whole[: rng.integers(end)]
        garbage = rng.bytes(len(whole))
        assert fault(with_fields(record, **{field: cut})) == field
        assert fault(with_fields(record, **{field: garbage})) == field


@pytest.mark.parametrize("field", ["cam2head", "K", "expression"])
def test_numbers_that_are_not_finite_are_found(record, rng, field):
    whole = parse_fields(record)[field]
    for _ in range(THOUSAND):
        broken = whole.copy()
        broken[rng.integers(len(whole))] = rng.choice([np.nan, np.inf, -np.inf])
        assert fault(with_fields(record, **{field: broken})) == field


@pytest.mark.parametrize(("field", "length"), [("expression", 135), ("cam2head", 16), ("K", 9)])
def test_codes_and_cameras_of_another_length_are_found(record, rng, field, length):
    for _ in range(THOUSAND):
        other = rng.choice(np.setdiff1d(np.arange(2 * length), length))
        values = np.resize(parse_fields(record)[field], other)
        assert fault(with_fields(record, **{field: values})) == field


def test_masks_of_another_size_are_found(record, rng):
    for _ in range(THOUSAND):
        shape = rng.integers(1, 64, 2)
        if (shape == 32).all():
            continue
        mask = as_png(np.full(shape, 255, np.uint8))
        assert fault(with_fields(record, mask=mask)) == "mask"


def test_images_of_another_kind_are_found(record):
    grey, square = np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.uint8)
    assert fault(with_fields(record, image=as_png(square))) == "none"
    assert fault(with_fields(record, image=as_png(grey))) == "image"
    assert fault(with_fields(record, mask=as_png(square))) == "mask"


def test_missing_fields_are_found(record):
    for field in FIELDS:
        name = re.escape(field.encode())
        renamed = re.sub(b"\n" + bytes([len(field)]) + name, lambda m: m[0][:-1] + b"?", record)
        assert renamed != record
        assert fault(renamed) == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", np.zeros((16, 12, 3), np.uint8)),
        ("image", np.zeros((16, 16, 3), np.float32)),
        ("mask", np.zeros((8, 8), np.uint8)),
        ("cam2head", 2 * np.eye(4, dtype=np.float32)),
        ("cam2head", np.diag([1, 1, -1, 1]).astype(np.float32)),
        ("K", np.diag([-1, 1, 1]).astype(np.float32)),
        ("expression", np.zeros(120, np.float32)),
        ("source", 2),
    ],
)
def test_frames_that_break_their_contract_are_not_written(field, value):
    broken = dataclasses.replace(frame(), **{field: value})
    with pytest.raises(FrameError, match=f"^{field}: "):
        check_frame(broken)
    with pytest.raises(FrameError, match=f"^{field}: "):
        encode_frame(broken)


# In shards


def config(root, **changes) -> ConfigDict:
    identity = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    return ConfigDict(
        {
            "root": str(root),
            "mixture": {"mono": 1, "multi": 1},
            "image_size": 16,
            "targets": 2,
            "jaw_temperature": 3.0,
            "jitter": {"probability": 0.0, **identity},
            "bad_records": "skip",
            "max_bad_fraction": 1.0,
            "workers": 0,
            **changes,
        }
    )


@pytest.fixture
def root(tmp_path):
    write_shards(TinyCaptures("mono", num_clips=3, timesteps=6), tmp_path)
    write_shards(TinyCaptures("multi", num_clips=2, timesteps=3, cameras=3), tmp_path)
    return tmp_path


def damage(folder, record: int, rng: np.random.Generator) -> tuple[str, int]:
    """Flips one bit of a record in its shard; returns the shard's name and the place in it."""
    prepared = PreparedSet(folder)
    content, shard = prepared.record(record), prepared.index.shard_of(record)
    path = sorted(folder.glob("*.array_record-*"))[shard]
    file = bytearray(path.read_bytes())
    file[file.index(content) + rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(file)
    return path.name, record - int(prepared.index.shard_start[shard])


def test_a_thousand_bits_flipped_in_a_shard_are_found(root, rng):
    folder = root / "mono"
    prepared = PreparedSet(folder)
    content, pickled = prepared.record(2), pickle.dumps(prepared)
    path = sorted(folder.glob("*.array_record-*"))[0]
    whole = path.read_bytes()
    start = whole.index(content)
    for _ in range(THOUSAND):
        flipped = bytearray(whole)
        flipped[start + rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(RecordError, match=f"record 2 of .*{path.name}: record: "):
            pickle.loads(pickled).frame(2)  # opens the shard anew


def test_shard_of_another_origin_is_found(root, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Shifted(TinyCaptures):
        def clip(self, i):
            return super().clip((i + 2) % self.num_clips)

    write_shards(Shifted("mono", num_clips=3, timesteps=6), tmp_path / "other")
    for shard in (tmp_path / "other" / "mono").glob("*.array_record-*"):
        (root / "mono" / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(RecordError, match="person: it is p1, by the index p0"):
        PreparedSet(root / "mono").frame(0)


def test_raise_names_shard_record_and_field(root, rng):
    shard, place = damage(root / "mono", 8, rng)
    iterator = make_iterator(config(root, bad_records="raise"), seed=0, global_batch=36)
    with pytest.raises(RecordError, match=f"record {place} of .*{shard}: record: "):
        next(iterator)


def test_raise_reaches_through_worker_processes(root, rng):
    shard, place = damage(root / "mono", 8, rng)
    iterator = make_iterator(config(root, bad_records="raise"), seed=0, global_batch=36, workers=1)
    with pytest.raises(RecordError, match=f"record {place} of .*{shard}: record: "):
        next(iterator)
    iterator.close()


def test_skip_replaces_counts_and_names_bad_records(root, rng, caplog):
    bad = {(0, r) for r in (0, 8)} | {(1, r) for r in (0, 3, 6)}  # 0, 3, 6: a camera of a clip
    names = [damage(root / ("mono", "multi")[number], r, rng) for number, r in sorted(bad)]
    with caplog.at_level(logging.WARNING, "absl"):
        iterator = make_iterator(config(root), seed=0, global_batch=12)
        batches = [next(iterator) for _ in range(8)]
    used = {(e[0], r) for batch in batches for e in batch.example.tolist() for r in e[1:]}
    assert not used & bad
    assert len(used) > 20
    assert sum(batch.bad_records.sum() for batch in batches) > 10
    for shard, place in names:
        assert re.search(f"skipped record {place} of .*{shard}", caplog.text)
    halves = [
        make_iterator(config(root), 0, 12, process_index=i, process_count=2) for i in range(2)
    ]
    for batch in batches:
        parts = [next(half) for half in halves]
        for field, halves_field in zip(batch, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(field, np.concatenate(halves_field))


def test_bad_records_do_not_change_other_examples(root, rng):
    clean = next(make_iterator(config(root), seed=0, global_batch=36))
    damage(root / "mono", 8, rng)
    damaged = next(make_iterator(config(root), seed=0, global_batch=36))
    met = damaged.bad_records > 0
    assert 0 < met.sum() < 36
    for field, other in zip(clean, damaged, strict=True):
        np.testing.assert_array_equal(field[~met], other[~met])
    np.testing.assert_array_equal(clean.background, damaged.background)


def test_too_many_bad_records_stop_the_run(root, rng):
    damage(root / "mono", 8, rng)
    iterator = make_iterator(config(root, max_bad_fraction=0.003), seed=0, global_batch=36)
    with pytest.raises(UserError, match="records read are bad, more than"):
        collections.deque(iterator, maxlen=0)


def test_a_set_of_bad_records_alone_stops_the_run(root, rng):
    for record in range(18):
        damage(root / "mono", record, rng)
    iterator = make_iterator(config(root, mixture={"mono": 1}), seed=0, global_batch=4)
    with pytest.raises(RecordError, match="mono-train"):
        next(iterator)
