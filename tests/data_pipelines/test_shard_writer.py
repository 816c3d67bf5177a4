"""Captures become shards, whatever the workers and however often it is killed."""

import dataclasses
import os
import re
import signal
import subprocess
import sys

import memory_bucket  # noqa: F401 (az:// paths)
import numpy as np
import pytest
from tiny_captures import DiesAtClip, TinyCaptures, contents, frame

from data_pipelines.errors import TRY_AGAIN, MissingFileError, UserError
from data_pipelines.shard_writer import write_shards
from data_pipelines.shards import PreparedSet


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    captures = TinyCaptures(num_clips=6)
    write_shards(captures, tmp_path / "one", workers=1)
    write_shards(captures, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one" / "tiny") == contents(tmp_path / "two" / "tiny")


def test_killed_preparation_goes_on_and_redoes_no_finished_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(DiesAtClip(), tmp_path / "killed")
    with pytest.raises(MissingFileError, match="no finished data set"):
        PreparedSet(tmp_path / "killed" / "tiny")
    shards = sorted((tmp_path / "killed" / "tiny").glob("*.array_record-*"))
    times = [s.stat().st_mtime_ns for s in shards]
    assert len(shards) == 3
    write_shards(TinyCaptures(), tmp_path / "killed")
    write_shards(TinyCaptures(), tmp_path / "whole")
    assert contents(tmp_path / "killed" / "tiny") == contents(tmp_path / "whole" / "tiny")
    assert [s.stat().st_mtime_ns for s in shards] == times


def test_folder_of_other_settings_is_left_alone(tmp_path):
    write_shards(TinyCaptures(), tmp_path, {"seed": 0})
    before = contents(tmp_path / "tiny")
    with pytest.raises(UserError, match="was prepared with seed 0, not 1"):
        write_shards(TinyCaptures(), tmp_path, {"seed": 1})
    assert contents(tmp_path / "tiny") == before


@dataclasses.dataclass(frozen=True)
class RenamedClip(TinyCaptures):
    def clip_name(self, i: int) -> str:
        return "another" if i == 3 else super().clip_name(i)


def test_as_many_clips_of_other_names_are_other_captures(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(DiesAtClip(), tmp_path)
    with pytest.raises(UserError, match=r"was prepared with 1 clips that its source .* \(s3, "):
        write_shards(RenamedClip(), tmp_path)


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="no prepared data set"):
        write_shards(TinyCaptures(), tmp_path)
    assert list(contents(tmp_path / "tiny")) == ["thesis.tex"]


def test_summary_says_what_was_left_out_and_why(tmp_path):
    summary = write_shards(TinyCaptures(skip=(1,), bad_frames=(2,)), tmp_path)
    assert (summary.people, summary.clips, summary.frames) == (2, 3, 12)
    assert summary.clips_left_out == {"its calibration is missing": ["s1"]}
    assert summary.frames_left_out == {"K: it holds a number that is not finite": 3}
    assert "left out 1 clips (s1): its calibration is missing" in str(summary)
    assert len(PreparedSet(tmp_path / "tiny")) == 12


def test_what_was_left_out_is_tried_again_when_asked_for(tmp_path):
    write_shards(TinyCaptures(skip=(1,)), tmp_path / "mended")
    shards = sorted((tmp_path / "mended" / "tiny").glob("*.array_record-*"))
    times = [s.stat().st_mtime_ns for s in shards]
    assert write_shards(TinyCaptures(), tmp_path / "mended").clips == 3
    assert write_shards(TinyCaptures(), tmp_path / "mended", retry=True).clips == 4
    redone = [s.stat().st_mtime_ns for s in shards]
    assert [a == b for a, b in zip(times, redone, strict=True)] == [True, False, True, True]
    write_shards(TinyCaptures(), tmp_path / "whole")
    assert contents(tmp_path / "mended" / "tiny") == contents(tmp_path / "whole" / "tiny")
    # Nothing is left to try again: all stays as it is.
    write_shards(TinyCaptures(), tmp_path / "mended", retry=True)
    assert [s.stat().st_mtime_ns for s in shards] == redone


def test_a_frame_that_was_left_out_is_tried_again_too(tmp_path):
    write_shards(TinyCaptures(bad_frames=(2,)), tmp_path)
    assert write_shards(TinyCaptures(), tmp_path, retry=True).frames == 20


@dataclasses.dataclass(frozen=True)
class UnreadableClip(TinyCaptures):
    def clip(self, i: int):
        if i == 2:
            raise OSError("video.mp4 is no video")
        return super().clip(i)


def test_clip_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"clip s2 of tiny cannot be read \(video\.mp4"):
        write_shards(UnreadableClip(), tmp_path)


@dataclasses.dataclass(frozen=True)
class KillsItsWorker(TinyCaptures):
    def clip(self, i: int):
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().clip(i)


def test_killed_worker_is_reported_and_leaves_no_rubbish_behind(tmp_path):
    with pytest.raises(UserError, match="worker process was killed"):
        write_shards(KillsItsWorker(), tmp_path, workers=2)
    write_shards(TinyCaptures(), tmp_path)
    assert len(list((tmp_path / "tiny").iterdir())) == 4 + 8  # shards, and the files beside them


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(UserError, match="tiny has no clips"):
        write_shards(TinyCaptures(num_clips=0), tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no frame is left .* its calibration .* --retry"):
        write_shards(TinyCaptures(num_clips=2, skip=(0, 1)), tmp_path)
    assert write_shards(TinyCaptures(num_clips=2), tmp_path, retry=True).clips == 2


@dataclasses.dataclass(frozen=True)
class MixedClip(TinyCaptures):
    def clip(self, i: int):
        yield frame(person="a")
        yield frame(person="b")


def test_clip_of_two_people_is_left_out(tmp_path):
    with pytest.raises(UserError, match=r"left out 4 clips \(s0, s1, s2, s3\): it mixes people"):
        write_shards(MixedClip(), tmp_path)


def test_a_damaged_folder_is_not_taken_for_a_finished_one(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    folder = tmp_path / "tiny"
    whole = contents(folder)

    def assert_named(file: str, expected: str) -> None:
        with pytest.raises(UserError, match=expected) as error:
            write_shards(TinyCaptures(), tmp_path)
        assert "prepare it again" in str(error.value)
        (folder / file).write_bytes(whole[file])

    shard = next(name for name in whole if "array_record" in name)
    for file in (shard, "summary.json"):
        (folder / file).unlink()
        assert_named(file, f"tiny/{file} is missing")
    for file in ("settings.json", "summary.json"):
        (folder / file).write_bytes(whole[file][:-5])
        assert_named(file, f"tiny/{file} is damaged")
    write_shards(TinyCaptures(), tmp_path)


@dataclasses.dataclass(frozen=True)
class ImpossibleClip(TinyCaptures):
    error: Exception | None = None

    def clip(self, i: int):
        yield from super().clip(i)
        if i == 2:
            raise self.error


@pytest.mark.parametrize(
    "error", [UserError("bad"), OverflowError("bad"), np.linalg.LinAlgError("bad"), MemoryError()]
)
def test_one_impossible_clip_costs_itself_alone(tmp_path, error):
    summary = write_shards(ImpossibleClip(error=error), tmp_path)
    assert summary.clips == 3
    assert next(iter(summary.clips_left_out.values())) == ["s2"]


def test_a_defect_of_the_program_keeps_its_trace_and_names_the_clip(tmp_path):
    with pytest.raises(KeyError) as caught:
        write_shards(ImpossibleClip(error=KeyError("x")), tmp_path)
    assert caught.value.__notes__ == ["in clip s2 of tiny"]


def test_a_full_disk_ends_a_preparation_with_a_sentence_that_may_be_tried_again(tmp_path):
    """A limit on the size of files stands for a full disk."""
    program = """
import resource, sys
from data_pipelines import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(prepare.main(sys.argv[1:]))
"""
    sizes = ["--size=64", "--monocular-people=2", "--multiview-people=1", "--test-people=1"]
    done = subprocess.run(
        [sys.executable, "-c", program, "procedural", f"--out={tmp_path}", "--workers=1", *sizes],
        capture_output=True,
        text=True,
    )
    assert done.returncode == TRY_AGAIN, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: .*/procedural_\w+-train\S* cannot be written \(.*\); make room", error)
