"""Collectives and cycles, read from the text of a compiled program."""

from flexavatar_jax.planning.hlo import Collective, collectives, estimated_cycles

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
