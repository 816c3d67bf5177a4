"""FLEX-1's training step, compiled for an H100 that need not be here."""

import re

import pytest

from configs import flex1
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.training.compilation import abstract_batch, abstract_frozen
from flexavatar_jax.training.sharding import make_mesh
from flexavatar_jax.training.train_step import TrainProgram
from kernels import backends

EXAMPLES = 20


@pytest.mark.slow
def test_flex1s_step_fits_an_h100_and_keeps_no_logits(h100, cudnn):
    """20 examples of 5 pictures, without the perceptual losses."""
    config = flex1.get_config()
    config.batch, config.rasterizer = EXAMPLES, "pallas_gpu"
    mesh = make_mesh(**config.mesh, devices=[h100])
    program = TrainProgram.create(config, mesh, load_template(config.model.template))
    with backends.compiling_for("gpu"):
        lowered = program.jitted_step().trace(
            program.abstract_state, abstract_frozen(config, mesh), abstract_batch(config, mesh)
        )
    # Without a GPU to try them on, XLA finds no tiles for some products of its own: cuBLAS's, then.
    options = {"xla_gpu_enable_triton_gemm": False}
    compiled = lowered.lower(lowering_platforms=("cuda",)).compile(options)
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    calls = re.findall(r'custom_call_target="__cudnn\$(\w+)"', hlo)
    assert calls.count("fmhaSoftmaxBackward") > 0
    assert not re.search(r"f32\[[\d,]*1024,10(24|29|30)\]", hlo)
    # 57 GB of 80, its libraries' workspaces apart.
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 60e9
