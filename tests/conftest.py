"""Fixtures that every room's tests use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the published model's parity data and real tracked portraits."""
    root = Path(__file__).resolve().parents[1]
    for candidate in (os.environ.get("FLEXAVATAR_SHARED"), root.parent / "shared"):
        if candidate and (Path(candidate) / "flex1").is_dir():
            return Path(candidate)
    pytest.skip("parity data not found: set FLEXAVATAR_SHARED to the folder with flex1/ and real/")
