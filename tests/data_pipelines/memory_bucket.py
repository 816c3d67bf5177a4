"""A bucket in memory for tests: it stands in for a store in the cloud, and counts what is fetched.

Azure's protocol is taken for it, so that tests against servers have s3:// and gs:// for themselves:
epath keeps one file system a protocol for as long as a process lives.
"""

from __future__ import annotations

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class MemoryBucket(MemoryFileSystem):
    """Files at az://BUCKET/...; of shards, only ranges may be read.

    Attributes:
      fetched: bytes of shards that were read, for a test to set to 0.
    """

    protocol = "az"
    store, pseudo_dirs = {}, [""]
    fetched = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("az://"))

    def cat_file(self, path, start=None, end=None, **options):
        content = super().cat_file(path, start, end, **options)
        MemoryBucket.fetched += len(content) if "array_record" in path else 0
        return content

    def _open(self, path, mode="rb", **options):
        assert mode != "rb" or "array_record" not in path, "a shard is fetched whole"
        return super()._open(path, mode, **options)


fsspec.register_implementation("az", MemoryBucket, clobber=True)
