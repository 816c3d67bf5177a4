"""Builds the CUDA library of the `cuda` backend: `python -m kernels.cuda.build`.

Needs NVIDIA's compiler, nvcc, but no GPU. The library lands in the user's cache folder under a name
made from its sources and the installed jaxlib, so that a stale one is never loaded: after an update
of either, build again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib

SOURCES = Path(__file__).parent

GPU_ARCHITECTURES = ("sm_80", "sm_90")
"""Compiled ahead (A100, H100); the PTX of the last serves newer ones, compiled at first use."""


class BuildError(RuntimeError):
    """The library cannot be built; the message says what to do."""


def library_path(emulation: bool = False) -> Path:
    """Where the library of these sources and this jaxlib is, or would be."""
    digest = hashlib.sha256(jaxlib.__version__.encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cu"), *SOURCES.glob("*.cc")]):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = "emulation" if emulation else "cuda"
    return cache / "flexavatar_jax" / f"splats-{kind}-{digest.hexdigest()[:16]}.so"


def build(emulation: bool = False) -> Path:
    """Compile the library unless it is there, and return its path.

    Args:
      emulation: build the kernels for the CPU instead, with a host compiler. Slow; for tests.

    Raises:
      BuildError: a compiler is missing or fails, or the cache folder cannot be written.
    """
    path = library_path(emulation)
    if path.exists():
        return path
    command = _host_command() if emulation else _cuda_command()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise BuildError(
            f"{path.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    with scratch as folder:
        built = Path(folder) / path.name
        command += ["-isystem", jax.ffi.include_dir(), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise BuildError(f"`{' '.join(command)}` failed:\n{result.stderr.strip()}")
        built.replace(path)
    return path


def _cuda_command() -> list[str]:
    command = [_find_nvcc(), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--threads=0"]
    numbers = [name.removeprefix("sm_") for name in GPU_ARCHITECTURES]
    for number in numbers:
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    command += ["-gencode", f"arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]
    return [*command, str(SOURCES / "splats.cu")]


def _find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    search = os.pathsep.join(
        [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    )
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None:
        raise BuildError(
            "nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda/bin; install NVIDIA's "
            "CUDA toolkit 12 or newer (https://developer.nvidia.com/cuda-downloads)"
        )
    return nvcc


def _host_command() -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler was found; install g++ or clang++, or set CXX")
    return [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(SOURCES / "emulation.cc")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.cuda.build", description=__doc__)
    parser.add_argument(
        "--emulation", action="store_true", help="build for the CPU instead, as the tests do"
    )
    arguments = parser.parse_args()
    path = library_path(arguments.emulation)
    if not path.exists():
        print(f"compiling {path.name}; this takes a minute or two", flush=True)
    try:
        print(build(arguments.emulation))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
