"""A network in an ONNX file that somebody hands over: read without running anything else of theirs.

onnxruntime (`pip install '.[faces]'`) runs it on the CPU with the operators of the ONNX standard;
libraries of further operators are not loaded, nor weights that lie in other files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from data_pipelines.errors import TRY_AGAIN, UserError

NORMALISING = ("Sub", "BatchNormalization")
"""Operators on the input by which a network shows that it takes bytes as they are."""

MAX_SIDE = 1024
"""Pixels a side of the pictures that a network may take."""


class OnnxNetwork:
    """A network of one picture, [1, 3, S, S] float32, RGB.

    Attributes:
      path: of its file.
      size: S.
      normalises: whether it subtracts its training set's mean itself, and takes 0 to 255.
    """

    def __init__(self, path: str | os.PathLike[str], size: int):
        """Reads the file; `size` is what S is where the file leaves it open.

        Raises:
          UserError: no such file, none of ONNX, a network of other inputs, with weights in other
            files or operators that onnxruntime does not have; the libraries aren't installed.
        """
        onnx, runtime = _libraries()
        self.path = os.fspath(path)
        try:
            content = epath.Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); expected an ONNX network",
                status=TRY_AGAIN,
            ) from error
        try:
            model = onnx.load_from_string(content)
        except Exception as error:  # of protobuf, whose implementations have their own
            raise UserError(f"{path} is no ONNX file; fetch or export it again") from error
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in _messages(model, "Tensor")):
            raise UserError(
                f"{path} has weights in other files, which are not read; save it as one file "
                "(onnx.save does so)"
            )
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is said once, below
        try:
            self._session = runtime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise UserError(f"{path} cannot be run by onnxruntime: {_brief(error)}") from error
        self.size = self._input_size(size)
        name = self._session.get_inputs()[0].name
        first = {node.op_type for node in model.graph.node if name in node.input}
        self.normalises = bool(first & set(NORMALISING))

    def _input_size(self, default: int) -> int:
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        free = [n if isinstance(n, int) and n > 0 else None for n in shape]  # else a name, or None
        sizes = {n or default for n in free[2:]}
        if (
            len(free) != 4
            or free[0] not in (None, 1)
            or free[1] not in (None, 3)
            or len(sizes) != 1
            or inputs[0].type != "tensor(float)"
        ):
            found = ", ".join(f"{i.name} {i.shape} {i.type}" for i in inputs)
            raise UserError(
                f"{self.path} takes {found}; expected one input of float32 pictures, [1, 3, S, S]"
            )
        size = sizes.pop()
        if size > MAX_SIDE:
            raise UserError(
                f"{self.path} takes pictures of {size} pixels a side; expected {MAX_SIDE} or fewer"
            )
        return size

    def __call__(
        self,
        image: Float[np.ndarray, "S S 3"],
        mean: float | Sequence[float],
        deviation: float | Sequence[float],
    ) -> list[Float[np.ndarray, "..."]]:
        """All outputs for an image, RGB in [0, 1].

        Args:
          mean, deviation: of the network's training set, in [0, 1], for one that doesn't know them.

        Raises:
          UserError: it fails, or what comes out is not finite.
        """
        image = 255 * image if self.normalises else (image - np.asarray(mean)) / deviation
        batch = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)
        try:
            outputs = self._session.run(None, {self._session.get_inputs()[0].name: batch})
        except Exception as error:
            raise UserError(f"{self.path} fails on a picture: {_brief(error)}") from error
        if not all(map(_all_finite, outputs)):
            raise UserError(
                f"{self.path} gives what is not finite numbers; fetch or export it again"
            )
        return outputs

    def probe(self) -> list[tuple[int, ...]]:
        """Shapes of the outputs, found by running it once: files need not say them."""
        return [x.shape for x in self(np.zeros((self.size, self.size, 3), np.float32), 0, 1)]


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"networks in ONNX files need {error.name}; `pip install '.[faces]'`"
        ) from error
    return onnx, onnxruntime


def _messages(message: Any, kind: str) -> Iterator[Any]:
    """All messages `kind`Proto within a protobuf message, branches' and functions' too."""
    if message.DESCRIPTOR.name == f"{kind}Proto":
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _messages(inner, kind)


def _all_finite(output: Any) -> bool:
    """Whether these are finite numbers: outputs may be strings, maps or nothing, too."""
    numeric = isinstance(output, np.ndarray) and output.dtype.kind in "fiu"
    return numeric and bool(np.isfinite(output).all())


def _brief(error: Exception) -> str:
    """The first line of what onnxruntime says."""
    return str(error).strip().partition("\n")[0][:300]
