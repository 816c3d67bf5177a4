"""torch.save files are read to the last bit, and nothing in them is ever run."""

import collections
import copy
import os
import pickle
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_save
from torch_save import Call, Global, Storage, parameter, save, tensor

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.torch_files import load_torch_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(0, 50, shape).astype(dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("BoolStorage", np.bool_),
        ("ByteStorage", np.uint8),
        ("CharStorage", np.int8),
        ("ShortStorage", np.int16),
        ("IntStorage", np.int32),
        ("LongStorage", np.int64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("ComplexFloatStorage", np.complex64),
        ("ComplexDoubleStorage", np.complex128),
    ],
)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_every_type_of_tensor_comes_back_bit_for_bit(path, kind, dtype, byteorder):
    data = numbers(3, 4).astype(dtype)
    stored = data if byteorder == "little" or data.itemsize == 1 else data.byteswap()
    save(path, {"w": tensor(Storage(stored, kind), (3, 4), (4, 1))}, byteorder)
    loaded = load_torch_file(path)["w"]
    assert loaded.dtype == dtype
    assert loaded.tobytes() == data.tobytes()


@pytest.mark.parametrize(
    "kind",
    [
        "uint16",
        "uint32",
        "uint64",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
    ],
)
def test_types_without_a_storage_class_of_their_own(path, kind):
    data = np.abs(numbers(6)).astype(getattr(ml_dtypes, kind, kind))
    rebuild = Global("torch._utils", "_rebuild_tensor_v3")
    storage = Storage(data.view(np.uint8), "UntypedStorage", "torch.storage")
    dtype = Global("torch", kind)
    save(path, Call(rebuild, storage, 0, (2, 3), (3, 1), False, {}, dtype, None))
    loaded = load_torch_file(path)
    assert loaded.dtype == data.dtype
    assert loaded.tobytes() == data.tobytes()


def test_a_state_dict_keeps_names_views_and_what_lies_beside_it(path):
    data = numbers(24)
    storage = Storage(data, "FloatStorage")
    state = collections.OrderedDict(
        {
            "transposed": tensor(storage, (3, 2), (1, 3), offset=6),
            "shared": parameter(tensor(storage, (24,), (1,))),
            "expanded": tensor(storage, (5, 2), (0, 1), offset=1),
            "scalar": tensor(storage, (), (), offset=23),
            "empty": tensor(Storage(np.empty(0, np.float32), "FloatStorage"), (0, 3), (3, 1)),
        }
    )
    state._metadata = {"": {"version": 1}}
    extra = {"step": 900_000, "lr": 1e-4, "tags": ["a", None, True, (1, 2)], "names": {"x", "y"}}
    save(path, {"model": state, **extra})
    loaded = load_torch_file(path)
    assert {name: loaded[name] for name in extra} == extra
    model = loaded["model"]
    assert list(model) == ["transposed", "shared", "expanded", "scalar", "empty"]
    np.testing.assert_array_equal(model["transposed"], data[6:12].reshape(2, 3).T)
    np.testing.assert_array_equal(model["shared"], data)
    np.testing.assert_array_equal(model["expanded"], np.tile(data[1:3], (5, 1)))
    assert model["scalar"] == data[23]
    assert model["scalar"].shape == ()
    assert model["empty"].shape == (0, 3)
    assert np.shares_memory(model["transposed"], model["shared"])
    with pytest.raises(ValueError, match="read-only"):
        model["shared"][0] = 1.0


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays_and_containers(path, protocol):
    twice = numbers(2, 2)
    content = {
        "float": numbers(1, 100),
        "fortran": np.asfortranarray(numbers(3, 4)),
        "big endian": numbers(5).astype(">f8"),
        "empty": np.empty((0, 4), np.int16),
        "scalar": np.float64(0.1),
        "text": np.array(["ab", "cde"]),
        "bytes": b"\x00\xff",
        "no bytes": b"",
        "first": twice,
        "again": [twice],
    }
    save(path, content, protocol=protocol)
    loaded = load_torch_file(path)
    for name in ("float", "fortran", "empty", "text"):
        np.testing.assert_array_equal(loaded[name], content[name], strict=True)
    np.testing.assert_array_equal(loaded["big endian"], content["big endian"])
    assert loaded["scalar"] == np.float64(0.1)
    assert loaded["bytes"] == b"\x00\xff"
    assert loaded["no bytes"] == b""
    assert loaded["again"][0] is loaded["first"]


def test_a_real_tracking_is_read_as_pickle_reads_it(shared_dir):
    frame = shared_dir / "real/tracking/marble_sculpture/checkpoint/00000.frame"
    with zipfile.ZipFile(frame) as archive:
        expected = pickle.loads(archive.read("00000/data.pkl"))  # a file of ours, so it may run
    loaded = load_torch_file(frame)
    assert loaded.keys() == expected.keys()
    for group in ("flame", "camera"):
        for name, value in expected[group].items():
            np.testing.assert_array_equal(loaded[group][name], value, strict=True)


class Payload:
    """Leaves a trace where the reader would be made to run it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_is_named_and_not_run(path, tmp_path, protocol):
    save(path, {"weights": Payload(tmp_path / "trace")}, protocol=protocol)
    with pytest.raises(UserError, match=r"asks for posix\.mkdir.*nothing of it was run"):
        load_torch_file(path)
    assert not (tmp_path / "trace").exists()


HOSTILE = {
    "instance": b"(S'echo'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'echo'\no.",
    "extension": b"\x82\x01.",
    "getattr": b"cbuiltins\ngetattr\n(cos\nS'system'\ntR.",
    "module by its path": b"\x80\x04\x8c\x09posix.sys\x8c\x06system\x93\x8c\x04echo\x85R.",
    "numpy's loader": b"cnumpy\nload\n(S'x.npy'\ntR.",
    "state of a class": b"ccollections\nOrderedDict\n}S'x'\nI1\nsb.",
    "another class of array": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nmatrix\nI0\ntR.",
    "other persistent id": b"\x80\x02(U\x06modulecos\nsystem\nU\x010U\x03cpuK\x01tQ.",
    "text persistent id": b"P0\n.",
    "nested keys": b"\x80\x02}K\x01" + b"\x85" * 50 + b"K\x01s.",
    "text of terabytes": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.",
    "empty stack": b"\x80\x02a.",
    "nothing": b"",
}


@pytest.mark.parametrize("program", HOSTILE)
def test_hand_made_pickles_end_in_one_sentence(path, program):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", HOSTILE[program])
    with pytest.raises(UserError, match=r"\.pt: ") as caught:
        load_torch_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_memo_of_gigabytes_costs_nothing(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02K\x01r\xff\xff\xff\x7f.")
    assert load_torch_file(path) == 1


def test_arrays_of_objects_are_refused(path):
    save(path, {"codes": np.array([{}, None], dtype=object)})
    with pytest.raises(UserError, match="type 'O8'"):
        load_torch_file(path)


def test_structured_arrays_are_refused(path):
    save(path, np.zeros(2, [("x", "f4")]))
    with pytest.raises(UserError, match=r"type 'V4'"):
        load_torch_file(path)


@pytest.mark.parametrize(
    ("claimed", "shape", "strides", "offset", "sentence"),
    [
        (10**12, (4,), (1,), 0, "holds 16 bytes where its tensors say 1000000000000 elements"),
        (3, (3,), (1,), 0, "holds 16 bytes where its tensors say 3 elements"),
        (4, (2, 4), (4, 1), 0, "reaches past its storage of 4 elements"),
        (4, (4,), (1,), 1, "reaches past its storage"),
        (4, (2,), (10**9,), 0, "reaches past its storage"),
        (4, (4,), (-1,), 3, "-1 where a size should be"),
        (4, (2**40, 2**40), (0, 0), 0, "not a whole file"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(path, claimed, shape, strides, offset, sentence):
    storage = Storage(numbers(4), "FloatStorage")
    storage.size = claimed
    save(path, tensor(storage, shape, strides, offset))
    with pytest.raises(UserError, match=sentence):
        load_torch_file(path)


def test_an_array_of_another_size_than_its_bytes(path):
    reconstruct = Global("numpy._core.multiarray", "_reconstruct")
    state = (1, (10**6, 10**6), np.dtype("f4"), False, b"1234")
    save(path, Call(reconstruct, Global("numpy", "ndarray"), (0,), b"b", state=state))
    with pytest.raises(UserError, match=r"shape \(1000000, 1000000\).*with 4 bytes"):
        load_torch_file(path)


def test_a_missing_storage(path):
    save(path, {"w": tensor(Storage(numbers(4), "FloatStorage"), (4,), (1,))})
    with zipfile.ZipFile(path) as archive:
        content = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(UserError, match="no member archive/data/0"):
        load_torch_file(path)


def test_a_zip_bomb_is_not_unpacked(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N" * 10**6)
    with pytest.raises(UserError, match="its parts declare 1000000 bytes"):
        load_torch_file(path)


def test_cut_or_flipped_files(path):
    save(path, {"w": tensor(Storage(numbers(100), "FloatStorage"), (100,), (1,))})
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole file"):
            load_torch_file(path)
    flipped = bytearray(whole)
    flipped[whole.index(numbers(100).tobytes()) + 30] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="CRC"):
        load_torch_file(path)
    far = bytearray(whole)
    far[29] = 255  # the first member's content would begin past the end of the file
    path.write_bytes(far)
    with pytest.raises(UserError, match=r"not a whole file .*\(EOFError\)"):
        load_torch_file(path)


def test_other_files(path):
    with pytest.raises(MissingFileError, match="no such file"):
        load_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"without the one data\.pkl"):
        load_torch_file(path)


def test_the_writer_of_these_tests_writes_what_python_pickles(path):
    """Guards the tests: a fake writer must not be what makes them pass."""
    torch_save.save(path, {"a": [1, 2.5, "x"]})
    with zipfile.ZipFile(path) as archive:
        assert pickle.loads(archive.read("archive/data.pkl")) == {"a": [1, 2.5, "x"]}


def bomb(tmp_path, pickled: bytes, storage: bytes = b"", copies: int = 1):
    """A file as torch.save writes them, of a pickle written by hand."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("archive/data/0", storage)
    return path


def collision(i: int) -> bytes:
    """Pickles an integer whose hash is that of all others."""
    number = (i * (2**61 - 1)).to_bytes(12, "little", signed=True)
    return b"\x8a" + bytes([len(number)]) + number


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(("
    b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    b"K\x00(\x8a\x06\x00\x00\x00\x00\x00\x01t(K\x00t\x89}tR"  # shape (2**40,), strides (0,)
)
BOMBS = {
    "dicts that hold each other twice": b"}" + b"q\x00}(K\x00h\x00K\x01h\x00u" * 40,
    "a list that holds itself": b"]q\x00h\x00a",
    "200,000 levels": b"]" * 200_000 + b"a" * 199_999,
    "keys that collide": b"}(" + b"".join(collision(i) + b"N" for i in range(60_000)) + b"u",
    "a million steps": b"N0" * 500_000 + b"N",
    "one number in a tensor of terabytes": TENSOR,
    "a string encoded again and again": b"X\x00\x00\x10\x00"
    + b"x" * (1 << 20)
    + b"q\x00"
    + b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR0" * 20_000,
    "a name made of containers": b")q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"h\x00\x93",
    "a size made of containers": b")q\x00"
    + b"h\x00h\x00\x86q\x00" * 40
    + TENSOR.replace(b"K\x00(\x8a", b"h\x00(\x8a"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_mean_huge_things_are_refused_at_once(tmp_path, name):
    path = bomb(tmp_path, BOMBS[name], b"\x00" * 4)
    start = time.process_time()
    with pytest.raises(UserError, match=r"bomb\.pt: "):
        load_torch_file(path)
    assert time.process_time() - start < 2


def test_a_zip_whose_parts_overlap_is_refused(tmp_path):
    """One member's bytes named a thousand times in the zip's directory: 1.4 MB for 1.4 GB."""
    path = bomb(tmp_path, b"N", b"\x00" * 1_400_000)
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += [copy.copy(archive.getinfo("archive/data/0")) for _ in range(1000)]
        archive._didModify = True
    with pytest.raises(UserError, match=r"its parts declare \d+ bytes where the file has \d+"):
        load_torch_file(path)
