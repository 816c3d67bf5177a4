"""The .avatar file: what is written comes back, and what a stranger wrote does no harm."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.errors import UserError
from flexavatar_jax.avatars.avatar_file import (
    Avatar,
    content_digest,
    load_avatar,
    save_avatar,
)


def make_avatar(**changes) -> Avatar:
    rng = np.random.default_rng(0)
    fields = dict(
        name="anna",
        code=rng.standard_normal((16, 8), np.float32),
        expressions=rng.standard_normal((3, 135), np.float32),
        cam2heads=np.repeat(np.eye(4, dtype=np.float32)[None], 3, axis=0),
        Ks=np.repeat(np.eye(3, dtype=np.float32)[None], 3, axis=0),
        seen=np.array([2, 0], np.int32),
        offsets=rng.standard_normal((2, 135), np.float32),
        preview=rng.integers(0, 255, (6, 6, 3), np.uint8),
        checkpoint="c" * 32,
        template="t" * 32,
        notes={"step": 800, "loss": 0.25, "sources": "anna.jpg"},
    )
    return Avatar(**(fields | changes))


@pytest.fixture
def path(tmp_path):
    save_avatar(tmp_path / "anna.avatar", make_avatar())
    return tmp_path / "anna.avatar"


def test_what_is_written_comes_back_to_the_bit(path):
    written, read = make_avatar(), load_avatar(path)
    for field in dataclasses.fields(Avatar):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(written, field.name))
    np.testing.assert_array_equal(read.expression, written.expressions[2])  # the first frame seen
    assert [p.name for p in path.parent.iterdir()] == ["anna.avatar"]


def rewrite(path, metadata=None, **arrays):
    """The file with some arrays, some fields, or its whole JSON replaced, and a fitting digest."""
    content = load_file(path) | arrays
    fields = dict(name="anna", checkpoint="", template="", notes={}, version=1)
    if isinstance(metadata, str):
        text = metadata
    else:
        fields |= metadata or {}
        text = json.dumps(fields | {"digest": content_digest(content, fields)})
    save_file(content, path, metadata={"flexavatar": text})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(metadata=dict(version=2)), "is of format 2, .* update it"),
        (dict(metadata=dict(version="1" * 500)), "format version is '1+\\.\\.\\.$"),
        (dict(metadata=dict(name=["anna"])), "its name is no text"),
        (dict(metadata=dict(notes={"a": {"b": 1}})), "its notes are no texts and numbers"),
        (dict(metadata="[" * 100_000), "damaged one"),
        (dict(metadata='"avatar"'), "no JSON object"),
        (dict(code=np.zeros((16, 8), np.float64)), "its code is float64"),
        (dict(code=np.zeros((0, 8), np.float32)), r"its code is float32 \[0, 8\]"),
        (dict(expressions=np.zeros((2, 135), np.float32)), r"expected float32 \[2, 4, 4\]"),
        (dict(code=np.full((16, 8), np.nan, np.float32)), "its code holds numbers that are not"),
        (dict(seen=np.array([0, 3], np.int32)), "names frames that are not in it"),
        (dict(seen=np.array([0, -1], np.int32)), "names frames that are not in it"),
        (dict(more=np.zeros(3)), "has too much, 'more'"),
        ({"x" * 100_000: np.zeros(3)}, r"has too much, 'x+\.\.\.$"),
        ({"\x1b[2J": np.zeros(3)}, r"has too much, '\\x1b\[2J'"),
        (dict(metadata=dict(name="\ud800")), "its name is no text"),
        (dict(metadata=dict(notes={"a": "\ud800"})), "its notes are no texts and numbers"),
    ],
)
def test_a_file_that_is_no_avatar_gets_a_sentence(path, change, sentence):
    rewrite(path, **change)
    with pytest.raises(UserError, match=sentence) as error:
        load_avatar(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"PK\x03\x04" + bytes(60)])
def test_any_other_file_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"anna.avatar is no .avatar file"):
        load_avatar(path)


def test_a_file_cut_anywhere_or_with_any_bit_flipped_is_found(path):
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*rng.integers(0, len(whole), 50), *rng.integers(0, header, 100)]:
        for content in (whole[:at], flip(whole, int(at), int(rng.integers(8)))):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"anna\.avatar"):
                load_avatar(path)


def test_what_is_rewritten_as_it_was_is_still_read(path):
    """The rewriting of the tests above does no harm of its own."""
    rewrite(path)
    np.testing.assert_array_equal(load_avatar(path).code, make_avatar().code)


def flip(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def test_a_file_that_is_not_there_or_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"nobody.avatar cannot be read \(No such file"):
        load_avatar(tmp_path / "nobody.avatar")
    with pytest.raises(UserError, match="cannot be written"):
        save_avatar("/proc/anna.avatar", make_avatar())


@pytest.mark.usefixtures("any_types")
def test_an_avatar_that_is_none_is_not_written(tmp_path):
    with pytest.raises(UserError, match="its offsets is"):
        save_avatar(tmp_path / "anna.avatar", make_avatar(offsets=np.zeros((3, 135), np.float32)))
    assert not list(tmp_path.iterdir())
