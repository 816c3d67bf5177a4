"""The training step compiled for TPUs that aren't here."""

import importlib.util
import re
import subprocess
import sys

import jax
import pytest

from data_pipelines.mixture import make_iterator
from flexavatar_jax.compile_ahead import abstract_batch
from flexavatar_jax.planning.hlo import Collective, collectives, estimated_cycles
from flexavatar_jax.training.sharding import make_mesh
from flexavatar_jax.training.train_step import SCOPES

HLO = """
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(f32[] %a, f32[] %b)
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %m = f32[8] fusion(), metadata={op_name="jit(step)/jvp(head)/dot"}, b={"estimated_cycles":"100"}
  %ag = f32[8,16]{1,0} all-gather(f32[2,16] %x), replica_groups={{0,1,2,3}}, dimensions={0}
}

%less (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%counted (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = f32[8] fusion(), metadata={op_name="jit(step)/head/while/dot"}, b={"estimated_cycles":"20"}
}

%all-reduce-scatter (q: bf16[64]) -> bf16[8] {
  %ar = bf16[64]{0:T(256)} all-reduce(bf16[64] %q), replica_groups=[1,8]<=[8], to_apply=%sum
}

ENTRY %main (p0: f32[2,16]) -> f32[] {
  %w = (s32[], f32[8,16]) while(%t), condition=%c, body=%body, b={"known_trip_count":{"n":"5"}}
  %v = (s32[], f32[8]) while(%t), condition=%less, body=%counted
  %f = bf16[8]{0} fusion(bf16[64] %g), kind=kCustom, calls=%all-reduce-scatter
  %s = (f32[4], f32[32]) all-gather-start(f32[4] %y), replica_groups=[1,8]<=[8], dimensions={0}
  %d = f32[32] all-gather-done((f32[4], f32[32]) %s)
  %n = f32[8] fusion(), metadata={op_name="jit(step)/tail/dot"}, b={"estimated_cycles":"7"}
  %g = f32[8] fusion(), b={"estimated_cycles":"9223372036854775807"}
  %o = f32[8] copy(), backend_config={"estimated_cycles":"3"}
  %alone = f32[4] all-reduce(f32[4] %y), replica_groups={{0},{1}}, to_apply=%sum
  %m = f32[3] all-reduce(%y), replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}, to_apply=%sum
  ROOT %r = f32[] all-reduce(f32[] %l), replica_groups={{0,1}}, metadata={op_name="jit(step)/mean"}
}
"""


def test_collectives_are_read_from_hlo_each_as_often_as_it_runs():
    gather = Collective("all-gather", 4, 8 * 16 * 4, "")
    assert collectives(HLO) == [
        *[gather] * 5,
        Collective("reduce-scatter", 8, 64 * 2, ""),
        Collective("all-gather", 8, 32 * 4, ""),
        Collective("all-reduce", 4, 3 * 4, ""),
        Collective("all-reduce", 2, 4, "jit(step)/mean"),
    ]
    assert gather.sent == 8 * 16 * 4 * 3 / 4
    assert Collective("all-reduce", 4, 100, "").sent == 2 * 100 * 3 / 4


def test_cycles_are_summed_by_scope_each_as_often_as_it_runs():
    assert estimated_cycles(HLO, ["head", "tail", "none"]) == {
        "head": 5 * 100 + 3 * 20,
        "tail": 7,
        "none": 0,
        "other": 3,
    }


def test_the_shapes_compiled_for_are_those_of_a_batch(tiny_config):
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = next(make_iterator(tiny_config.data, 0, tiny_config.batch))
    shapes = {name: (x.shape, x.dtype) for name, x in abstract_batch(tiny_config, mesh).items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in batch.items()}


def compile_ahead(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flexavatar_jax.compile_ahead", "--config=configs/demo.py"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_an_unknown_topology_is_named_in_one_sentence():
    done = compile_ahead("--topology=v9x:4x4")
    assert done.returncode == 1
    (error,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "v9x:4x4" in error
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.slow
def test_the_demo_compiles_for_a_pod():
    # Eight chips are no whole axis of the torus.
    done = compile_ahead("--topology=v6e:4x4", "--config.mesh.fsdp=8")
    assert done.returncode == 0, done.stderr
    for expected in ("16 chips", "memory a chip", "TFLOP a step", "predicted step", "examples/s"):
        assert expected in done.stdout
    assert not done.stderr
    # Each part of the step is found in what was compiled, and rendering comes with its kernels.
    line = next(x for x in done.stdout.splitlines() if x.startswith("predicted step"))
    parts = {name: float(time) for name, time in re.findall(r"(\w+) ([\d.e-]+)(?:,|$)", line)}
    assert all(parts[scope] > 0 for scope in SCOPES if scope != "features")
    total = float(re.search(r"([\d.]+) ms", line)[1])
    assert sum(parts.values()) == pytest.approx(total, rel=0.02)
