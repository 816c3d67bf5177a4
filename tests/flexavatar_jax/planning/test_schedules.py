"""Kernels' cycles, counted in the listings of what libtpu has scheduled."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from flexavatar_jax.planning.schedules import count_cycles, kernel_cycles

LISTING = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.vmem [shape: f32[8,128], index: 0, kind: input,
                                    memory_space: any] }
   0x1   :  { %s2 = smov 0 }
   0x2 LB: > { %s3 = sphi %s2, %s4  /* phi copy :: iteration index, stage = 0 */ } /* Region */
   0x3   : > { %p9 = scmp.ge.s32.totalorder %s3, 4 }
   0x4 LB: >> { %v1 = vld [vmem:[%s1] sm:$0xff]  ;;  %s5 = sphi %s6, %s7 /* phi copy */ }
   0x5   :  {}
   0x6   : >> { %p1 = scmp.ge.s32.totalorder %s5, 10 /* loop exit test */ }
   0x7   : >> { %9 = sbr.rel (!%p1) target = $region1 }
   0x8 LB: >> { %v2 = vadd.f32 %v1, %v1 }
   0x9   : >> { %p2 = scmp.ge.s32.totalorder %s8, 3 /* loop exit test */  ;;  %9 = sbr.rel }
   0xa   : > { %p3 = scmp.ge.s32.totalorder %s3, 6 /* loop exit test */ }
   0xb   :  { %9 = vsyncpa [#allocation3], 1 }
"""
A_TURN = 2 + 10 * 4 + 3 * 2 + 1


def test_bundles_count_as_often_as_they_are_executed():
    """The loop over programs goes round twice more, for what comes first and goes last."""
    assert count_cycles(LISTING) == 2 + (6 - 2) * A_TURN + 1


def test_a_loop_that_follows_its_data_has_no_cycles_to_count():
    assert count_cycles(LISTING.replace("%s5, 10 /*", "%s5, %s77 /*")) is None


def test_listings_are_found_by_the_names_of_operations(tmp_path):
    (tmp_path / "17-block_forward.2-00-final_bundles.txt").write_text(LISTING)
    (tmp_path / "17-block_forward.3-00-schedule-analysis_final_bundles.txt").write_text("")
    (tmp_path / "18-lists.1-01-final_bundles.txt").write_text(
        LISTING.replace("%s3, 6 /*", "%s3, %s77 /*")
    )
    assert kernel_cycles(tmp_path) == {"block_forward.2": 3 + 4 * A_TURN}


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_libtpu_says_what_it_schedules(tmp_path):
    """Of twice as many programs twice the cycles, and no fewer than the matrix unit needs."""
    program = """if True:
        import json, sys, jax, jax.numpy as jnp
        from flexavatar_jax.model import attention_tpu
        from flexavatar_jax.planning import schedules
        schedules.write_schedules(sys.argv[1])
        from kernels.bench import tpu_costs
        device = tpu_costs.topology_devices("v5e:2x2")[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        found = []
        for batch in (8, 16):
            x = jax.ShapeDtypeStruct((batch, 1024, 256), jnp.bfloat16, sharding=sharding)
            attend = lambda x: attention_tpu.attend(x, [x], [x], None, heads=2)
            jax.jit(attend).lower(x).compile()
            found.append(schedules.kernel_cycles(sys.argv[1])["attention_forward.1"])
        print(json.dumps(found))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    eight, sixteen = json.loads(done.stdout.splitlines()[-1])
    assert sixteen == pytest.approx(2 * eight, rel=0.01)
    products = 2 * 2 * 16 * 2 * 1024 * 1024 * 128
    assert 0.85 * products < sixteen * 4 * 2 * 128 * 128 < 2 * products
