"""What a data set offers to be prepared: clips of frames, and reasons for leaving some out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from data_pipelines.frame import Frame


class SkipClip(Exception):  # noqa: N818
    """Raised by `CaptureSet.clip` to leave a clip out; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class SkippedFrame:
    """Yielded by `CaptureSet.clip` in place of a frame that is left out, with the reason."""

    reason: str


@runtime_checkable
class CaptureSet(Protocol):
    """A source of clips to prepare.

    It must be picklable, as worker processes read clips in parallel, and a clip must be the same
    whenever it is read.

    Attributes:
      name: a Python identifier, the name of the prepared folder.
      num_clips: how many clips there are; known without reading them.
    """

    name: str
    num_clips: int

    def clip_name(self, i: int) -> str:
        """What clip `i` is called in the source; known without reading it."""

    def clip(self, i: int) -> Iterable[Frame | SkippedFrame]:
        """The frames of clip `i`, all of one person and sequence, in the order to be stored.

        Raises `SkipClip` with a reason, at once or at any frame, to leave the whole clip out.
        """
