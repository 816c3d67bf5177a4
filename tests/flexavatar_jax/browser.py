"""Headless Chromium for tests of pages: a skip where there is none, and waiting."""

import contextlib
import io
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import UserError
from flexavatar_jax.avatars.export import fidelity
from flexavatar_jax.avatars.export.fidelity import PATIENCE, decode_picture, open_page

__all__ = ["chromium", "decode_picture", "decode_png", "open_page", "wait_until"]


@contextlib.contextmanager
def chromium() -> Iterator:
    """A browser; skips where there is none."""
    with contextlib.ExitStack() as stack:
        try:
            browser = stack.enter_context(fidelity.chromium())
        except UserError as error:
            pytest.skip(str(error))
        yield browser


def wait_until(page, condition: str) -> None:
    """Waits until a JavaScript condition holds.

    Playwright's own waiting evaluates strings in the page, which our pages' policy forbids.
    """
    until = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < until, f"never came: {condition}"
        page.wait_for_timeout(50)


def decode_png(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) / 255
