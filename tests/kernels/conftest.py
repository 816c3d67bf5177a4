"""Fixtures of the kernels' tests."""

import jaxtyping
import pytest


@pytest.fixture
def any_types():
    """Signatures aren't checked, where tests run with `--jaxtyping-packages`: the code's own
    sentence about a wrong argument is what is tested."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
