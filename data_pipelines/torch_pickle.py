"""Interprets the pickle of a file that `torch.save` wrote, without running what is in it.

A pickle is a program that may call anything, so it is never given to `pickle`: its opcodes are
interpreted here, and the only calls known are those that build NumPy arrays, tensors and
containers. Whatever else a pickle asks for is refused by name.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any

import numpy as np

from data_pipelines.torch_storages import (
    DTYPES,
    RefusedError,
    Storages,
    as_count,
    expect,
    shaped_array,
    short,
    strided_tensor,
)

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

MAX_OPCODES = 200_000
"""Of a pickle, half a second of work; a checkpoint of a thousand tensors has some 30,000."""

MAX_NODES = 1_000_000
"""What the containers of a file may come to, copied or walked through, as readers will."""

MAX_NUMBER_KEYS = 10_000
"""Keys that are numbers: unlike strings', their hashes can be made to collide."""


class _Global(str):
    """A global that the pickle names, `module.attribute`; never looked up anywhere."""

    __slots__ = ()


class _ArrayType:
    """A NumPy dtype under construction: REDUCE gives its kind, BUILD its byte order."""

    def __init__(self, kind: str):
        # Whitelist of numbers, strings and bytes: "O" would be an array of Python objects.
        if not (isinstance(kind, str) and re.fullmatch(r"b1|[iufc]\d{1,2}|[SU]\d{1,9}", kind)):
            raise RefusedError(
                f"an array of type '{short(kind)}', but only arrays of numbers and strings are "
                "read."
            )
        self.dtype = np.dtype(kind)

    def build(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise RefusedError(f"an array with byte order {short(state[1])}.")
        if any(part is not None for part in state[2:5]):
            raise RefusedError(
                "a structured array, but only arrays of numbers and strings are read."
            )
        self.dtype = self.dtype.newbyteorder(state[1])


class Interpreter:
    """Runs one pickle's opcodes on a stack of inert values."""

    def __init__(self, storages: Storages):
        self._storages = storages
        self._stack: list = []
        self._marks: list[list] = []
        self._memo: dict[int, Any] = {}
        self._number_keys = self._copied = 0

    def run(self) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._storages.pickle())):
            if count == MAX_OPCODES:
                raise RefusedError(
                    f"its pickle has over {MAX_OPCODES} steps, more than any checkpoint needs."
                )
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANT_VALUES.get(opcode.name, argument))
            elif opcode.name not in ("PROTO", "FRAME"):
                act = getattr(self, f"_{opcode.name.lower()}", None)
                if act is None:
                    raise RefusedError(
                        f"its pickle uses {opcode.name}, which tensors, arrays and containers "
                        "do not need; it was not run."
                    )
                act(argument)
        raise RefusedError("its pickle has no end; the file is damaged.")

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
        expect(self._stack[-1], list).extend(items)

    def _setitem(self, _) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _setitems(self, _) -> None:
        self._set_items(self._since_mark())

    def _set_items(self, items: list) -> None:
        target = expect(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._hashable(key)] = value

    def _additems(self, _) -> None:
        items = self._since_mark()
        expect(self._stack[-1], set).update(map(self._hashable, items))

    # Names, calls and states.

    def _global(self, argument: str) -> None:
        self._stack.append(_Global(".".join(argument.split(" "))))

    def _stack_global(self, _) -> None:
        name, module = (expect(self._stack.pop(), str) for _ in range(2))
        self._stack.append(_Global(f"{module}.{name}"))

    def _reduce(self, _) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(name, expect(arguments, tuple)))

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
                return tuple(expect(arguments[0], tuple))
            case "builtins.bytes" | "__builtin__.bytes" if not arguments:
                return b""
            case "_codecs.encode" if arguments[1:] == ("latin1",):
                self._storages.take(len(expect(arguments[0], str)))
                return arguments[0].encode("latin1")
            case "numpy.dtype":
                return _ArrayType(arguments[0])
            case "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct":
                if arguments[0] != "numpy.ndarray":
                    raise RefusedError(
                        f"its pickle asks for an array of class {short(arguments[0])}."
                    )
                return np.empty(0, np.uint8)
            case "numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar":
                kind, raw = expect(arguments[0], _ArrayType).dtype, expect(arguments[1], bytes)
                return shaped_array((), kind, False, raw)[()]
            case "numpy.core.numeric._frombuffer" | "numpy._core.numeric._frombuffer":
                raw, kind, shape, order = arguments
                self._storages.take(len(expect(raw, bytes | bytearray)))
                raw = bytes(raw)
                return shaped_array(shape, expect(kind, _ArrayType).dtype, order == "F", raw)
            case "torch._utils._rebuild_tensor_v2":
                storage, offset, shape, strides = arguments[:4]
                return self._tensor(expect(storage, np.ndarray), offset, shape, strides)
            case "torch._utils._rebuild_tensor_v3":
                storage, offset, shape, strides, _, _, dtype = arguments[:7]
                dtype = str(expect(dtype, _Global)).removeprefix("torch.")
                if dtype not in DTYPES:
                    raise RefusedError(f"a tensor of type torch.{dtype}, which is not known here.")
                storage = self._storages.as_dtype(expect(storage, np.ndarray), dtype)
                return self._tensor(storage, offset, shape, strides)
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                return expect(arguments[0], np.ndarray)
        raise RefusedError(
            f"its pickle asks for {short(name)}, but only tensors, arrays and containers are "
            "read; nothing of it was run, and it should not be opened with other tools unless you "
            "trust whoever made it."
        )

    def _build(self, _) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, _ArrayType):
            target.build(expect(state, tuple))
        elif isinstance(target, np.ndarray) and target.size == 0 and target.flags.owndata:
            _, shape, kind, fortran, raw = expect(state, tuple)
            kind = expect(kind, _ArrayType).dtype
            array = shaped_array(shape, kind, fortran, expect(raw, bytes))
            self._storages.take(array.nbytes)
            # In place, as the memo may hold the array already.
            target.__setstate__((1, array.shape, kind, bool(fortran), raw))
        elif not isinstance(target, dict):
            # A dict's state is its attributes, such as a state dict's `_metadata`: not needed.
            raise RefusedError(f"its pickle sets the state of a {type(target).__name__}.")

    def _tensor(self, storage: np.ndarray, *layout: Any) -> np.ndarray:
        tensor = strided_tensor(storage, *layout)
        # Strides of zero make a tensor of any size out of a single number.
        self._storages.take(max(0, tensor.nbytes - storage.nbytes))
        return tensor

    def _hashable(self, key: Any) -> Any:
        """Only plain keys: hashing a tuple of tuples of tuples can be made to take for ever."""
        if not isinstance(key, str | bytes | int | float | bool | None):
            raise RefusedError(f"its pickle has a {type(key).__name__} as a key.")
        self._number_keys += not isinstance(key, str | bytes)
        if self._number_keys > MAX_NUMBER_KEYS:
            raise RefusedError(f"its pickle has over {MAX_NUMBER_KEYS} keys that are numbers.")
        return key

    def _counted(self, items: Any) -> Any:
        """Items of a container to be copied; a pickle may ask for the same ones again and again."""
        self._copied += len(expect(items, list | tuple | set | frozenset))
        if self._copied > MAX_NODES:
            raise RefusedError(f"its pickle copies over {MAX_NODES} items.")
        return items

    def _pairs(self, items: Any) -> list:
        """Key-value pairs of an OrderedDict pickled as a list of them."""
        return [(self._hashable(key), value) for key, value in self._counted(expect(items, list))]

    def _binpersid(self, _) -> None:
        kind, storage, key, _, size = expect(self._stack.pop(), tuple)
        if kind != "storage" or storage not in _STORAGES:
            raise RefusedError(f"its pickle asks for a {short(kind)} of type {short(storage)}.")
        self._stack.append(
            self._storages.read(str(expect(key, str | int)), _STORAGES[storage], as_count(size))
        )
