"""What a kernel is predicted to take, from its schedule or from published rates."""

import pytest

from flexavatar_jax.planning.hlo import Kernel
from flexavatar_jax.planning.predictions import _scheduled, kernel_seconds
from kernels.hardware import CHIPS

RATES = CHIPS["v5e"]
KERNEL = Kernel(
    "attention_forward.7",
    "jit(step)/decoder/attention_forward/pallas_call",
    runs=2,
    flops=int(1e-3 * RATES.bfloat16),
    transcendentals=int(1e-4 * RATES.float32),
    bytes=int(2e-4 * RATES.bandwidth),
)


def test_a_schedule_counts_but_never_less_than_products_and_bytes_take():
    cycles = int(1.5e-3 * RATES.clock)
    assert kernel_seconds(KERNEL, "v5e", cycles) == pytest.approx(1.5e-3)
    assert kernel_seconds(KERNEL, "v5e", cycles // 3) == pytest.approx(1e-3)
    heavy = KERNEL._replace(bytes=int(5e-3 * RATES.bandwidth))
    assert kernel_seconds(heavy, "v5e", cycles) == pytest.approx(5e-3)


def test_without_one_the_vector_unit_follows_the_matrix_unit():
    assert kernel_seconds(KERNEL, "v5e") == pytest.approx(1e-3 + 9 * 1e-4)
    with pytest.raises(KeyError):
        kernel_seconds(KERNEL._replace(operation="jit(step)/unheard_of/pallas_call"), "v5e")


def test_of_kernels_that_are_alike_one_is_scheduled_for_all():
    twin = KERNEL._replace(
        name="attention_forward.9", operation="jit(step)/encoder/attention_forward"
    )
    other = KERNEL._replace(name="attention_forward.11", flops=5)
    cycles = {KERNEL.name: 123, "fusion.1": 5}
    assert _scheduled([KERNEL, twin, other], cycles) == {KERNEL.name: 123, twin.name: 123}
