"""Every kernel of every released variant, at its own resolution, is scheduled by its own rule."""

import pytest
from tvm import s_tir, tirx

from dcnv3_tvm import frontend
from dcnv3_tvm.targets import resolve_target
from helpers.variant_kernels import variant_kernels

RULES = {"dcnv3_packed": "dcnv3"}
"""Rules by kind of kernel, where the names differ."""

SMALL = ("internimage_t", "internimage_s", "internimage_b")
"""The widths of the others are multiples of theirs."""

TARGETS = (("cpu-znver4", "bfloat16"), ("cpu-haswell", "float32"), ("cpu-znver4", "float32"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "name", "dtype"),
    [
        (variant, *target)
        for variant in frontend.list_models("internimage_*")
        for target in (TARGETS if variant in SMALL else TARGETS[:1])
    ],
)
def test_kernels_are_scheduled_by_their_own_rule(variant, name, dtype):
    kernels = variant_kernels(variant, resolve_target(name), dtype)
    layers = {"matmul", "convolution", "depthwise", "layer_norm", "dcnv3_packed"}
    assert layers < {kernel.kind for kernel in kernels}
    for kernel in kernels:
        assert kernel.rule == RULES.get(kernel.kind, kernel.kind), kernel.name
        if kernel.kind in layers:
            assert is_parallel(kernel.function), kernel.name


def is_parallel(function):
    schedule = s_tir.Schedule(function)
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    loops = [schedule.get(loop) for block in blocks for loop in schedule.get_loops(block)]
    return any(loop.kind == tirx.ForKind.PARALLEL for loop in loops)
