"""Captures become shards that TFDS reads, whatever the workers and however often it is killed."""

import dataclasses
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading

import memory_bucket  # noqa: F401 (az:// paths)
import numpy as np
import pytest
from etils import epath
from tiny_captures import TinyCaptures, expression, frame

from data_pipelines.errors import TRY_AGAIN, MissingFileError, UserError
from data_pipelines.numpy_files import to_npz
from data_pipelines.record import FrameError
from data_pipelines.shard_writer import Part, jaw_angle, write_shards
from data_pipelines.shards import PreparedSet


def contents(folder) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_frames_come_back_as_written(tmp_path):
    captures = TinyCaptures(cameras=2, size=64)
    write_shards(captures, tmp_path, quality=100)
    prepared = PreparedSet(tmp_path / "tiny")
    written = [f for i in range(captures.num_clips) for f in captures.clip(i)]
    assert len(prepared) == len(written) == 40
    for i in (0, 7, 39):
        read = prepared.frame(i)
        for field in dataclasses.fields(read):
            expected, found = getattr(written[i], field.name), getattr(read, field.name)
            if field.name == "image":
                assert np.abs(found.astype(int) - expected).max() <= 4
            else:
                np.testing.assert_array_equal(found, expected)


def test_index_knows_every_frame(tmp_path):
    write_shards(TinyCaptures(cameras=2), tmp_path)
    prepared = PreparedSet(tmp_path / "tiny")
    index = prepared.index
    for i in range(len(prepared)):
        read, clip = prepared.frame(i), index.clip_of(i)
        assert (index.person[clip], index.sequence[clip]) == (read.person, read.sequence)
        assert index.camera_names[index.camera[i]] == read.camera
        assert index.timestep[i] == read.timestep
        assert index.jaw[i] == pytest.approx(0.1 * (read.timestep % 4), abs=1e-6)
    assert index.image_size == 16


def test_tfds_reads_the_folder_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    write_shards(TinyCaptures(), tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "tiny")
    source = builder.as_data_source(split="train")
    prepared = PreparedSet(tmp_path / "tiny")
    assert len(source) == len(prepared)
    ours, theirs = prepared.frame(7), source[7]
    np.testing.assert_array_equal(theirs["mask"][..., 0], ours.mask)
    # Two JPEG decoders may round differently.
    assert np.abs(theirs["image"].astype(int) - ours.image).max() <= 3
    np.testing.assert_array_equal(theirs["cam2head"], ours.cam2head)
    np.testing.assert_array_equal(theirs["expression"], ours.expression)
    assert theirs["person"].decode() == ours.person
    assert "tensorflow" not in sys.modules


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    captures = TinyCaptures(num_clips=6)
    write_shards(captures, tmp_path / "one", workers=1)
    write_shards(captures, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one" / "tiny") == contents(tmp_path / "two" / "tiny")


@dataclasses.dataclass(frozen=True)
class DiesAtClip(TinyCaptures):
    dies_at: int = 3

    def clip(self, i: int):
        if i == self.dies_at:
            raise KeyboardInterrupt
        return super().clip(i)


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


def test_missing_and_cut_shards_are_named_at_the_start(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    shard = sorted((tmp_path / "tiny").glob("*.array_record-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=shard.name):
        PreparedSet(tmp_path / "tiny")
    shard.unlink()
    with pytest.raises(MissingFileError, match=f"{shard.name} is missing: .* prepare it again"):
        PreparedSet(tmp_path / "tiny")


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


@pytest.mark.parametrize("file", ["index.json", "index/jaw.npy", "settings.json"])
def test_damaged_index_is_named(tmp_path, file):
    write_shards(TinyCaptures(), tmp_path)
    whole = (tmp_path / "tiny" / file).read_bytes()
    (tmp_path / "tiny" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"settings.json of {tmp_path}/tiny is damaged"):
        PreparedSet(tmp_path / "tiny")


def test_flipped_bits_of_the_index_are_found(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    path = tmp_path / "tiny" / "index" / "jaw.npy"
    flipped = bytearray(path.read_bytes())
    flipped[-5] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="is damaged"):
        PreparedSet(tmp_path / "tiny")


def test_threads_share_a_set(tmp_path):
    write_shards(TinyCaptures(), tmp_path)
    prepared = PreparedSet(tmp_path / "tiny")
    expected = [prepared.record(i) for i in range(len(prepared))]
    found = [None] * 8
    again = PreparedSet(tmp_path / "tiny")

    def read(thread: int):
        found[thread] = [again.record(i) for i in range(len(again))]

    threads = [threading.Thread(target=read, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f == expected for f in found)


def test_jaw_angle_is_the_opening():
    assert jaw_angle(expression(0.0)) == pytest.approx(0.0, abs=1e-6)
    assert jaw_angle(expression(0.25)) == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(FrameError, match="jaw is no rotation"):
        jaw_angle(np.zeros(135, np.float32))


def test_a_bucket_serves_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXAVATAR_CACHE", str(tmp_path / "cache"))
    write_shards(TinyCaptures(), "az://bucket/data")
    write_shards(TinyCaptures(), tmp_path / "local")
    remote, local = PreparedSet("az://bucket/data/tiny"), PreparedSet(tmp_path / "local" / "tiny")
    assert [remote.record(i) for i in range(20)] == [local.record(i) for i in range(20)]
    assert (epath.Path("az://bucket/data/tiny") / "dataset_info.json").exists()


def test_a_bucket_written_anew_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXAVATAR_CACHE", str(tmp_path / "cache"))
    first = PreparedSet(write_to_bucket("az://other", quality=95)).record(0)
    epath.Path("az://other/tiny").rmtree()
    second = PreparedSet(write_to_bucket("az://other", quality=20)).record(0)
    assert first != second


def write_to_bucket(root: str, quality: int) -> str:
    write_shards(TinyCaptures(), root, quality=quality)
    return f"{root}/tiny"


def test_a_folder_with_all_of_its_index_in_one_file_still_opens(tmp_path):
    """As it was written before columns were mapped."""
    write_shards(TinyCaptures(), tmp_path)
    folder = tmp_path / "tiny"
    index = PreparedSet(folder).index
    (folder / "index.npz").write_bytes(to_npz(dataclasses.asdict(index)))
    (folder / "index.json").unlink()
    shutil.rmtree(folder / "index")
    for name, column in dataclasses.asdict(PreparedSet(folder).index).items():
        np.testing.assert_array_equal(column, getattr(index, name))


def test_processes_map_the_index_and_are_not_sent_it(tmp_path):
    write_shards(TinyCaptures(num_clips=64), tmp_path)
    prepared = PreparedSet(tmp_path / "tiny")
    sent = pickle.dumps(prepared)
    assert len(sent) < 1000
    assert pickle.loads(sent).frame(7).person == prepared.frame(7).person
    assert not prepared.index.jaw.flags.owndata  # it lies in the file


def test_a_folder_grows_and_what_was_there_is_not_written_again(tmp_path):
    folder = tmp_path / "tiny"
    write_shards(TinyCaptures(num_clips=3), tmp_path)
    times = {path.name[:31]: path.stat().st_mtime_ns for path in folder.glob("*record-*")}
    assert write_shards(TinyCaptures(num_clips=5), tmp_path).clips == 5
    prepared = PreparedSet(folder)
    assert [prepared.frame(i).sequence for i in range(0, 25, 5)] == [f"s{i}" for i in range(5)]
    now = {path.name[:31]: path.stat().st_mtime_ns for path in folder.glob("*record-*")}
    assert len(now) == 5
    assert all(path.name.endswith("-of-00005") for path in folder.glob("*record-*"))
    assert {name: now[name] for name in times} == times


def test_growing_that_was_killed_goes_on(tmp_path):
    write_shards(TinyCaptures(num_clips=1), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_shards(DiesAtClip(), tmp_path)
    assert write_shards(TinyCaptures(), tmp_path).clips == 4
    assert PreparedSet(tmp_path / "tiny").frame(15).sequence == "s3"


def test_parts_written_in_any_order_are_the_whole(tmp_path):
    captures = TinyCaptures(num_clips=7)
    write_shards(captures, tmp_path / "whole")
    for number in (3, 1):
        assert write_shards(captures, tmp_path / "parts", part=Part(number, 3)) is None
        with pytest.raises(MissingFileError, match="no finished data set"):
            PreparedSet(tmp_path / "parts" / "tiny")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts/tiny").glob("*record*")}
    assert len(shards) == 5
    write_shards(captures, tmp_path / "parts", part=Part(2, 3))
    assert write_shards(captures, tmp_path / "parts").clips == 7
    assert contents(tmp_path / "parts" / "tiny") == contents(tmp_path / "whole" / "tiny")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards  # merged, not written anew


def test_a_part_leaves_alone_what_another_is_writing(tmp_path):
    write_shards(TinyCaptures(), tmp_path, part=Part(1, 2))
    unfinished = tmp_path / "tiny/parts/.77.tiny-train.array_record-00001-of-00004"
    unfinished.touch()
    write_shards(TinyCaptures(), tmp_path, part=Part(1, 2))
    assert unfinished.exists()
    write_shards(TinyCaptures(), tmp_path, part=Part(2, 2))
    assert not unfinished.exists()


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/4"])
def test_parts_that_are_none(text):
    with pytest.raises(UserError, match="expected K/N"):
        Part.of(text)


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
