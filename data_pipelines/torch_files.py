"""Reads files that `torch.save` wrote, without PyTorch and without running what is in them.

Such a file is a zip: a pickle, `NAME/data.pkl`, and the raw bytes of each tensor storage,
`NAME/data/KEY`. A pickle is a program that may call anything, so it is never given to `pickle`:
its opcodes are interpreted here, and the only calls known are those that build NumPy arrays,
tensors and containers. Whatever else a pickle asks for is refused by name.

Used for Pixel3DMM's `.frame` files (plain NumPy arrays) and for published checkpoints (tensors).
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from data_pipelines.errors import MissingFileError, UserError

_DTYPES = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
"""PyTorch's dtypes by their names in `torch`."""

_STORAGES = {
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.HalfStorage": "float16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.BFloat16Storage": "bfloat16",
    "torch.storage.UntypedStorage": "uint8",
}
"""Element type of each class of storage that a persistent id may name."""

_CONSTANTS = {
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
    "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
"""Opcodes that push their argument."""

_CONSTANT_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}

MAX_OPCODES = 500_000
"""Of a pickle, 1 to 2 s of interpreting; a checkpoint of a thousand tensors has some 30,000."""

MAX_NODES, MAX_DEPTH = 1_000_000, 100
"""What the containers of a file may come to when they are walked through, as readers will."""

MAX_NUMBER_KEYS = 10_000
"""Keys that are numbers: unlike strings', their hashes can be made to collide."""

SPARE_BYTES = 1 << 26
"""How much more than the file's own size all its arrays together may come to."""

_DAMAGE = (
    *(zipfile.BadZipFile, EOFError, NotImplementedError, OSError, struct.error),
    *(ArithmeticError, LookupError, TypeError, ValueError),
)
"""How damaged files show: what `zipfile` raises, and opcodes whose operands make no sense."""


def load_torch_file(path: epath.PathLike) -> Any:
    """Returns what `torch.save` put into `path`: nested dicts, lists, tuples, numbers, arrays.

    Tensors and Parameters become read-only NumPy arrays of their shape and dtype (bfloat16 and
    float8 through ml_dtypes) that keep their strides; tensors that shared a storage still share
    it. OrderedDicts become dicts. Nothing in the file is executed.

    Raises:
      UserError: there is no such file (`MissingFileError`); it is not a whole torch.save zip; a
        storage is missing or of another size than its tensors say; the pickle asks for anything
        but tensors, arrays and containers, or for more of them than the file can mean.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file.")
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                content = _Interpreter(_Storages(archive, path.stat().length)).run()
                _check_extent(content)
                return content
        except _RefusedError as error:
            raise UserError(f"{path}: {error}") from None
        except _DAMAGE as error:
            raise UserError(
                f"{path}: not a whole file as torch.save writes them since PyTorch 1.6 "
                f"({' '.join(str(error).split()) or type(error).__name__}); copy or download it "
                "again."
            ) from None


class _RefusedError(Exception):
    """A sentence about what in the file cannot be read."""


class _Storages:
    """The zip's members: the pickle, and tensor storages read at most once each."""

    def __init__(self, archive: zipfile.ZipFile, file_bytes: int):
        self._archive = archive
        self._room = file_bytes + SPARE_BYTES
        # torch.save never compresses, so what is stored takes its place in the file.
        if (declared := sum(info.file_size for info in archive.infolist())) > file_bytes:
            raise _RefusedError(
                f"its parts declare {declared} bytes where the file has {file_bytes}; it is "
                "damaged or not what it says."
            )
        pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise _RefusedError(
                "a zip, but without the one data.pkl that torch.save writes; is it a checkpoint?"
            )
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._root + "byteorder"
        big = order in archive.namelist() and self._read(order) == b"big"
        self._byteorder = ">" if big else "<"
        self._read_before: dict[str, np.ndarray] = {}

    def take(self, size: int) -> None:
        """Counts the bytes of another array; a file may name the same ones again and again."""
        self._room -= size
        if self._room < 0:
            raise _RefusedError(
                "its arrays come to far more than the file; it is not what it says."
            )

    def pickle(self) -> bytes:
        return self._read(self._root + "data.pkl")

    def read(self, key: str, dtype: str, size: int) -> np.ndarray:
        """The storage `key` as a flat read-only array of `size` elements of a torch dtype."""
        kind = np.dtype(_DTYPES[dtype])
        if key not in self._read_before:
            raw = self._read(f"{self._root}data/{key}")
            self._read_before[key] = np.frombuffer(raw, np.uint8)
        raw = self._read_before[key]
        if size * kind.itemsize != raw.size:
            raise _RefusedError(
                f"storage {key} holds {raw.size} bytes where its tensors say {size} elements of "
                f"{dtype}; the file is damaged or not what it says."
            )
        return self.as_dtype(raw, dtype)

    def as_dtype(self, raw: np.ndarray, dtype: str) -> np.ndarray:
        kind = np.dtype(_DTYPES[dtype])
        if raw.size % kind.itemsize:
            raise _RefusedError(f"a storage of {raw.size} bytes cannot hold elements of {dtype}.")
        if self._byteorder == ">" and kind.itemsize > 1:
            self.take(raw.size)
            part = kind.itemsize // (2 if kind.kind == "c" else 1)
            raw = np.ascontiguousarray(raw.reshape(-1, part)[:, ::-1]).reshape(-1)
            raw.flags.writeable = False
        return raw.view(kind)

    def _read(self, name: str) -> bytes:
        try:
            info = self._archive.getinfo(name)
        except KeyError:
            raise _RefusedError(f"the zip has no member {name}; the file is damaged.") from None
        # torch.save never compresses; so a small file cannot unfold into a huge one.
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _RefusedError(
                f"member {name} is compressed or encrypted, which torch.save never does."
            )
        return self._archive.read(info)


class _Global(str):
    """A global that the pickle names, `module.attribute`; never looked up anywhere."""

    __slots__ = ()


class _ArrayType:
    """A NumPy dtype under construction: REDUCE gives its kind, BUILD its byte order."""

    def __init__(self, kind: str):
        # Whitelist of numbers, strings and bytes: "O" would be an array of Python objects.
        if not (isinstance(kind, str) and re.fullmatch(r"b1|[iufc]\d{1,2}|[SU]\d{1,9}", kind)):
            raise _RefusedError(
                f"an array of type '{_short(kind)}', but only arrays of numbers and strings are "
                "read."
            )
        self.dtype = np.dtype(kind)

    def build(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise _RefusedError(f"an array with byte order {_short(state[1])}.")
        if any(part is not None for part in state[2:5]):
            raise _RefusedError(
                "a structured array, but only arrays of numbers and strings are read."
            )
        self.dtype = self.dtype.newbyteorder(state[1])


class _Interpreter:
    """Runs one pickle's opcodes on a stack of inert values."""

    def __init__(self, storages: _Storages):
        self._storages = storages
        self._stack: list = []
        self._marks: list[list] = []
        self._memo: dict[int, Any] = {}
        self._number_keys = self._copied = 0

    def run(self) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._storages.pickle())):
            if count == MAX_OPCODES:
                raise _RefusedError(
                    f"its pickle has over {MAX_OPCODES} steps, more than any checkpoint needs."
                )
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANT_VALUES.get(opcode.name, argument))
            elif opcode.name not in ("PROTO", "FRAME"):
                act = getattr(self, f"_{opcode.name.lower()}", None)
                if act is None:
                    raise _RefusedError(
                        f"its pickle uses {opcode.name}, which tensors, arrays and containers "
                        "do not need; it was not run."
                    )
                act(argument)
        raise _RefusedError("its pickle has no end; the file is damaged.")

    # Stack and memo.

    def _mark(self, _) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _pop(self, _) -> None:
        self._stack.pop()

    def _pop_mark(self, _) -> None:
        self._since_mark()

    def _dup(self, _) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _) -> None:
        self._put(len(self._memo))

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _binget = _long_binget = _get

    # Containers.

    def _empty_dict(self, _) -> None:
        self._stack.append({})

    def _empty_list(self, _) -> None:
        self._stack.append([])

    def _empty_set(self, _) -> None:
        self._stack.append(set())

    def _empty_tuple(self, _) -> None:
        self._stack.append(())

    def _tuple(self, _) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _list(self, _) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def _dict(self, _) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set_items(items)

    def _frozenset(self, _) -> None:
        items = self._since_mark()
        self._stack.append(frozenset(map(self._hashable, items)))

    def _tuple1(self, _) -> None:
        self._stack[-1:] = [tuple(self._stack[-1:])]

    def _tuple2(self, _) -> None:
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def _tuple3(self, _) -> None:
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def _append(self, _) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list) -> None:
        _expect(self._stack[-1], list).extend(items)

    def _setitem(self, _) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _setitems(self, _) -> None:
        self._set_items(self._since_mark())

    def _set_items(self, items: list) -> None:
        target = _expect(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._hashable(key)] = value

    def _additems(self, _) -> None:
        items = self._since_mark()
        _expect(self._stack[-1], set).update(map(self._hashable, items))

    # Names, calls and states.

    def _global(self, argument: str) -> None:
        self._stack.append(_Global(".".join(argument.split(" "))))

    def _stack_global(self, _) -> None:
        name, module = (_expect(self._stack.pop(), str) for _ in range(2))
        self._stack.append(_Global(f"{module}.{name}"))

    def _reduce(self, _) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(name, _expect(arguments, tuple)))

    def _newobj(self, _) -> None:
        self._reduce(_)

    def _call(self, name: Any, arguments: tuple) -> Any:
        """The few calls that tensors, arrays and containers need."""
        match name:
            case "collections.OrderedDict" | "builtins.dict" | "__builtin__.dict":
                return dict(*map(self._pairs, arguments))
            case "builtins.set" | "__builtin__.set":
                return set(map(self._hashable, self._counted(*arguments)))
            case "builtins.frozenset" | "__builtin__.frozenset":
                return frozenset(map(self._hashable, self._counted(*arguments)))
            case "torch.Size":
                return tuple(_expect(arguments[0], tuple))
            case "builtins.bytes" | "__builtin__.bytes" if not arguments:
                return b""
            case "_codecs.encode" if arguments[1:] == ("latin1",):
                self._storages.take(len(_expect(arguments[0], str)))
                return arguments[0].encode("latin1")
            case "numpy.dtype":
                return _ArrayType(arguments[0])
            case "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct":
                if arguments[0] != "numpy.ndarray":
                    raise _RefusedError(
                        f"its pickle asks for an array of class {_short(arguments[0])}."
                    )
                return np.empty(0, np.uint8)
            case "numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar":
                kind, raw = _expect(arguments[0], _ArrayType).dtype, _expect(arguments[1], bytes)
                return _array((), kind, False, raw)[()]
            case "numpy.core.numeric._frombuffer" | "numpy._core.numeric._frombuffer":
                raw, kind, shape, order = arguments
                self._storages.take(len(_expect(raw, bytes | bytearray)))
                raw = bytes(raw)
                return _array(shape, _expect(kind, _ArrayType).dtype, order == "F", raw)
            case "torch._utils._rebuild_tensor_v2":
                storage, offset, shape, strides = arguments[:4]
                return self._tensor(_expect(storage, np.ndarray), offset, shape, strides)
            case "torch._utils._rebuild_tensor_v3":
                storage, offset, shape, strides, _, _, dtype = arguments[:7]
                dtype = str(_expect(dtype, _Global)).removeprefix("torch.")
                if dtype not in _DTYPES:
                    raise _RefusedError(f"a tensor of type torch.{dtype}, which is not known here.")
                storage = self._storages.as_dtype(_expect(storage, np.ndarray), dtype)
                return self._tensor(storage, offset, shape, strides)
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                return _expect(arguments[0], np.ndarray)
        raise _RefusedError(
            f"its pickle asks for {_short(name)}, but only tensors, arrays and containers are "
            "read; nothing of it was run, and it should not be opened with other tools unless you "
            "trust whoever made it."
        )

    def _build(self, _) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, _ArrayType):
            target.build(_expect(state, tuple))
        elif isinstance(target, np.ndarray) and target.size == 0 and target.flags.owndata:
            _, shape, kind, fortran, raw = _expect(state, tuple)
            kind = _expect(kind, _ArrayType).dtype
            array = _array(shape, kind, fortran, _expect(raw, bytes))
            self._storages.take(array.nbytes)
            # In place, as the memo may hold the array already.
            target.__setstate__((1, array.shape, kind, bool(fortran), raw))
        elif not isinstance(target, dict):
            # A dict's state is its attributes, such as a state dict's `_metadata`: not needed.
            raise _RefusedError(f"its pickle sets the state of a {type(target).__name__}.")

    def _tensor(self, storage: np.ndarray, *layout: Any) -> np.ndarray:
        tensor = _tensor(storage, *layout)
        # Strides of zero make a tensor of any size out of a single number.
        self._storages.take(max(0, tensor.nbytes - storage.nbytes))
        return tensor

    def _hashable(self, key: Any) -> Any:
        """Only plain keys: hashing a tuple of tuples of tuples can be made to take for ever."""
        if not isinstance(key, str | bytes | int | float | bool | None):
            raise _RefusedError(f"its pickle has a {type(key).__name__} as a key.")
        self._number_keys += not isinstance(key, str | bytes)
        if self._number_keys > MAX_NUMBER_KEYS:
            raise _RefusedError(f"its pickle has over {MAX_NUMBER_KEYS} keys that are numbers.")
        return key

    def _counted(self, items: Any) -> Any:
        """Items of a container to be copied; a pickle may ask for the same ones again and again."""
        self._copied += len(_expect(items, list | tuple | set | frozenset))
        if self._copied > MAX_NODES:
            raise _RefusedError(f"its pickle copies over {MAX_NODES} items.")
        return items

    def _pairs(self, items: Any) -> list:
        """Key-value pairs of an OrderedDict pickled as a list of them."""
        return [(self._hashable(key), value) for key, value in self._counted(_expect(items, list))]

    def _binpersid(self, _) -> None:
        kind, storage, key, _, size = _expect(self._stack.pop(), tuple)
        if kind != "storage" or storage not in _STORAGES:
            raise _RefusedError(f"its pickle asks for a {_short(kind)} of type {_short(storage)}.")
        self._stack.append(
            self._storages.read(str(_expect(key, str | int)), _STORAGES[storage], _count(size))
        )


def _array(shape: tuple, kind: np.dtype, fortran: bool, raw: bytes) -> np.ndarray:
    """The array of `raw`'s bytes, whose number must be what `shape` and `kind` need."""
    shape = tuple(map(_count, _expect(shape, tuple)))
    if math.prod(shape) * kind.itemsize != len(raw):
        raise _RefusedError(
            f"an array of shape {shape} and type {kind} with {len(raw)} bytes of data; "
            "the file is damaged."
        )
    return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
    """A view of a flat storage; every element it can reach lies inside the storage."""
    shape, strides = (tuple(map(_count, _expect(t, tuple))) for t in (shape, strides))
    reach = _count(offset) + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) and reach > storage.size:
        raise _RefusedError(
            f"a tensor of shape {shape} and strides {strides} at {offset} reaches past its "
            f"storage of {storage.size} elements; the file is damaged."
        )
    if math.prod(shape) == 0:
        return np.empty(shape, storage.dtype)
    kind = storage.dtype
    return np.ndarray(
        shape,
        kind,
        buffer=storage.view(np.uint8),
        offset=offset * kind.itemsize,
        strides=[s * kind.itemsize for s in strides],
    )


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _RefusedError(
            f"its pickle has a {type(value).__name__} where a {getattr(kind, '__name__', kind)} "
            "should be."
        )
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise _RefusedError(f"its pickle has {_short(value)} where a size should be.")
    return value


def _check_extent(content: Any) -> None:
    """Raises `_RefusedError` for containers that hold themselves, or one another over and over."""
    open_, nodes = [(content, 0)], 0
    while open_:
        value, depth = open_.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise _RefusedError(
                f"its containers come to over {MAX_NODES} values or {MAX_DEPTH} levels, more than "
                "any checkpoint has."
            )
        if isinstance(value, dict):
            open_ += ((item, depth + 1) for item in value.values())
        elif isinstance(value, list | tuple):
            open_ += ((item, depth + 1) for item in value)


def _short(value: Any) -> str:
    """A value for a sentence; printing containers can be made to take for ever."""
    return f"{value!s:.80}" if isinstance(value, str | int) else f"a {type(value).__name__}"
