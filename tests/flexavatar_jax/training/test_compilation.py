"""Compiled programs are kept for restarts, unless they are damaged, or find no room."""

import re

import jax
import pytest

from configs import flex1
from data_pipelines.errors import UserError
from flexavatar_jax.training.compilation import fitting, keep_compiled, record_compiled


@pytest.fixture
def _without_a_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("_without_a_cache")
def test_programs_of_which_one_is_damaged_are_compiled_anew(tmp_path):
    record_compiled(tmp_path)  # nothing is there yet
    program, used = (tmp_path / "compiled" / f"jit_step-{end}" for end in ("cache", "atime"))
    program.parent.mkdir()
    program.write_bytes(b"program")
    used.write_bytes(b"yesterday")
    record_compiled(tmp_path)
    used.write_bytes(b"today")
    keep_compiled(tmp_path)
    assert program.read_bytes() == b"program"
    assert jax.config.jax_compilation_cache_dir == str(program.parent)

    program.write_bytes(b"progral")
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled(tmp_path)
    assert not program.exists()


@pytest.mark.parametrize(
    ("remat", "batch", "ways"),
    [
        (
            0.5,
            20,
            "--config.model.remat=1, then --config.accumulate=20, then a smaller --config.batch",
        ),
        (1.0, 1, "a smaller --config.batch"),
    ],
)
def test_a_step_that_finds_no_room_is_told_what_takes_less(monkeypatch, remat, batch, ways):
    config = flex1.get_config()
    config.batch, config.model.remat = batch, remat
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError, match=f"batch {batch}: try {re.escape(ways)}$"), fitting(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")


def test_other_errors_of_the_runtime_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError), fitting(flex1.get_config()):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")
