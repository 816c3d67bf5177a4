"""Records of a shard in the cloud, each by a request for its own bytes and no others.

ArrayRecord's own client for gs:// asks for everything from a record to the end of the shard and
hangs up when it has enough (https://github.com/google/array_record/pull/209), which moves megabytes
for a record; for other stores there is none. So a shard's index keeps where its records end, and
those bytes are asked for (see `buckets`). ArrayRecord's files are Riegeli's: blocks of 64 KiB that
begin with a header, and through them a stream of chunks, here uncompressed with one record each
(https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import Int64

from data_pipelines import buckets

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK_HEADER = struct.Struct("<QQQQQ")  # hash, size, hash of data, kind and records, decoded size
FIRST_RECORD = _CHUNK_HEADER.size
"""Where a shard's first record begins in its stream: behind the chunk that signs the file."""


def record_ends(path: Path, count: int) -> Int64[np.ndarray, "count"]:
    """Where each of a local shard's `count` records ends in its stream, headers of blocks left out.

    Raises:
      ValueError: the shard is not one of uncompressed chunks of a record each.
    """
    ends, at = np.empty(count, np.int64), FIRST_RECORD
    if not count:
        return ends
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for i in range(count):
            header = _stream(lambda a, b: content[a:b], at, at + _CHUNK_HEADER.size)
            _, size, _, kind, _ = _CHUNK_HEADER.unpack(header)
            if kind != ord("r") | 1 << 8:
                raise ValueError(f"{path}: record {i} does not lie in a chunk of its own")
            at = ends[i] = at + _CHUNK_HEADER.size + size
    return ends


def read_record(path: epath.Path, begin: int, end: int) -> bytes:
    """The record at `begin` to `end` in the stream of a shard in the cloud.

    Raises:
      UserError: it cannot be fetched; names the shard.
      ValueError: what is there is no record.
    """
    chunk = _stream(lambda a, b: buckets.fetch(path, a, b), begin, end)
    _, size, _, _, decoded = _CHUNK_HEADER.unpack_from(chunk)
    if size != len(chunk) - _CHUNK_HEADER.size or not 0 < decoded <= size:
        raise ValueError("the shard is not the one that the index was written for")
    return chunk[len(chunk) - decoded :]


def _stream(read: Callable[[int, int], bytes], begin: int, end: int) -> bytes:
    """Bytes `begin` to `end` of the stream, by a function that reads bytes of the file."""
    inside = _BLOCK - _BLOCK_HEADER
    start, stop = _in_file(begin), _in_file(end - 1) + 1
    content = read(start, stop)
    first = min(len(content), inside - begin % inside)
    parts = [content[:first]]
    for block in range(first, len(content), _BLOCK):
        parts.append(content[block + _BLOCK_HEADER : block + _BLOCK])
    return b"".join(parts)


def _in_file(at: int) -> int:
    """Where a byte of the stream lies in the file."""
    block, place = divmod(at, _BLOCK - _BLOCK_HEADER)
    return block * _BLOCK + _BLOCK_HEADER + place
