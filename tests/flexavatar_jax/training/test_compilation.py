"""Compiled programs are kept for restarts, unless they are damaged."""

import jax
import pytest

from flexavatar_jax.training.compilation import keep_compiled, record_compiled


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
