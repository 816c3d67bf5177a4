"""Writes files byte for byte as `torch.save` lays them out, without PyTorch."""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


class Global:
    """Stands for `module.name`, a function or class that need not exist here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self, *_):
        raise AssertionError("only to be named in a pickle")


class Storage:
    """A tensor's memory: raw bytes, and the class and length that the pickle will claim."""

    def __init__(self, array: np.ndarray, kind: str, module: str = "torch"):
        self.raw, self.size = array.tobytes(), array.size
        self.kind = Global(module, kind)


class Call:
    """Pickled as a call of `function` with `arguments`, and a state for the result if given."""

    def __init__(self, function: Global, *arguments: Any, state: Any = None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce_ex__(self, _):
        return self.reduced


def tensor(storage: Storage, shape: tuple, strides: tuple, offset: int = 0) -> Call:
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, False, collections.OrderedDict())


def parameter(data: Call) -> Call:
    return Call(Global("torch._utils", "_rebuild_parameter"), data, True, collections.OrderedDict())


def save(path: Path, content: Any, byteorder: str = "little", protocol: int = 2) -> None:
    """Writes `content`, which may hold `Call`s and `Storage`s, as `torch.save` does."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", byteorder)
        for key, storage in enumerate(pickler.storages):
            archive.writestr(f"archive/data/{key}", storage.raw)
        archive.writestr("archive/version", "3\n")


class _Pickler(pickle._Pickler):  # the Python one: its `save` can be extended
    def __init__(self, file: io.BytesIO, protocol: int):
        super().__init__(file, protocol)
        self.storages: list[Storage] = []

    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        return ("storage", obj.kind, str(self.storages.index(obj)), "cpu", obj.size)

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)
