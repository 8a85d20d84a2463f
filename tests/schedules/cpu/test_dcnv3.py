"""The CPU schedule of DCNv3: its structure, and its results for sizes without common divisors."""

import dataclasses

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.ir import IRModule
from tvm.script import tirx as T

from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.schedules.cpu.dcnv3 import channel_tile, dcnv3, groups_at_once
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.tolerances import operator_bound
from helpers.specs import random_inputs

TARGETS = ("cpu-x86-64", "cpu-haswell", "auto")


def loops_of(func):
    """Return (kind, extent) of the loops around each block, without those of extent 1."""
    schedule = tvm.s_tir.Schedule(func)
    found = {}
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        loops = [schedule.get(loop) for loop in schedule.get_loops(block)]
        found[schedule.get(block).name_hint] = [
            (tirx.ForKind(loop.kind).name, getattr(loop.extent, "value", None)) for loop in loops
        ]
    return {name: [loop for loop in loops if loop[1] != 1] for name, loops in found.items()}


def test_structure():
    spec = DCNv3Spec.of((2, 56, 50, 64), group=4, softmax=True)
    loops = loops_of(
        dcnv3(tensorir.dcnv3_packed(spec), resolve_target("cpu-znver4"), SearchSpace())
    )
    pixel = [("PARALLEL", 112), ("SERIAL", 50)]
    unrolled = [("UNROLLED", 2), ("UNROLLED", 2)]
    for stage in ("coordinates", "corners", "pixels", "softmax_exp"):
        assert loops[stage] == [*pixel, ("VECTORIZED", 36)]
    assert loops["weights"] == [*pixel, *unrolled, ("VECTORIZED", 36)]
    pair = [*pixel, ("SERIAL", 2)]
    channels = [("VECTORIZED", 16)]
    assert loops["sum_init"] == [*pair, *unrolled, *channels]
    assert loops["sum_update"] == [*pair, ("UNROLLED", 9), *unrolled, *channels]
    assert loops["store"] == [*pair, ("SERIAL", 2), *channels]


@pytest.mark.parametrize(
    ("groups", "points", "lanes", "size"),
    [(4, 9, 16, 4), (16, 9, 16, 16), (32, 9, 16, 16), (40, 9, 16, 8), (7, 9, 16, 7), (6, 4, 8, 2)],
)
def test_groups_of_whole_vectors(groups, points, lanes, size):
    assert groups_at_once(groups, points, lanes) == size


def test_pixels_are_tasks_if_rows_are_few():
    target = resolve_target("llvm -mcpu=znver4 -num-cores=8")
    few = loops_of(
        dcnv3(tensorir.dcnv3(DCNv3Spec.of((1, 7, 7, 64), group=4)), target, SearchSpace())
    )
    assert few["store"][0] == ("PARALLEL", 49)
    many = loops_of(
        dcnv3(tensorir.dcnv3(DCNv3Spec.of((1, 16, 7, 64), group=4)), target, SearchSpace())
    )
    assert many["store"][:2] == [("PARALLEL", 16), ("SERIAL", 7)]


def test_points_of_large_windows_are_not_unrolled():
    spec = DCNv3Spec.of((1, 8, 8, 16), group=1, kernel_size=7, pad=3)
    loops = loops_of(dcnv3(tensorir.dcnv3(spec), resolve_target("cpu-znver4"), SearchSpace()))
    assert ("SERIAL", 49) in loops["sum_update"]
    assert loops["coordinates"][-1] == ("VECTORIZED", 49)


@pytest.mark.parametrize(
    ("channels", "lanes", "tile"),
    [
        (16, 16, 16),
        (32, 16, 32),
        (64, 16, 64),
        (80, 16, 40),
        (128, 16, 64),
        (7, 16, 7),
        (1, 16, 1),
        (67, 16, 1),
        (67, 4, 1),
        (16, 4, 16),
        (32, 8, 32),
        (96, 8, 32),
    ],
)
def test_channel_tile(channels, lanes, tile):
    assert channel_tile(channels, lanes) == tile


def test_refuses_other_kernels():
    @T.prim_func(s_tir=True)
    def other(a: T.handle):
        A = T.match_buffer(a, (8,), "float32")
        for i in range(8):
            with T.sblock("store"):
                v = T.axis.S(8, i)
                A[v] = T.float32(0)

    assert dcnv3(other, resolve_target("auto"), SearchSpace()) == Refusal(
        "schedules kernels 'dcnv3' and 'dcnv3_packed'; this is a stock operator"
    )


def test_refuses_the_variant_for_gpus():
    kernel = tensorir.dcnv3(DCNv3Spec.of((1, 4, 5, 8), group=2), vector_loads=True)
    assert dcnv3(kernel, resolve_target("auto"), SearchSpace()) == Refusal(
        "needs the kernel variant without vector loads; this is the one for GPUs"
    )


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("channels", [1, 7, 16, 40, 67, 80])
@pytest.mark.parametrize("name", TARGETS)
def test_results_for_odd_sizes(name, channels, symbolic):
    target = resolve_target(name)
    spec = DCNv3Spec.of((3, 13, 11, 3 * channels), group=3, softmax=True, stride=(1, 2))
    built = dataclasses.replace(spec, batch=None, height=None, width=None) if symbolic else spec
    scheduled = dcnv3(tensorir.dcnv3(built), target, SearchSpace())
    executable = tvm.compile(IRModule({"main": scheduled}), target=target)
    inputs = random_inputs(spec, seed=channels)
    out = np.full(spec.output_shape, np.nan, np.float32)
    arrays = (inputs.x, inputs.offset, inputs.mask)
    executable["main"](*(tensors.to_kernel(array) for array in (*arrays, out)))
    reference = dcnv3_reference(*arrays, spec)
    assert np.all(np.abs(out - reference) <= operator_bound(spec, *arrays, reference))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", TARGETS)
def test_results_in_other_dtypes(name, dtype):
    target = resolve_target(name)
    spec = DCNv3Spec.of((1, 9, 7, 34), group=2, dtype=dtype)
    executable = tvm.compile(
        IRModule({"main": dcnv3(tensorir.dcnv3(spec), target, SearchSpace())}), target=target
    )
    inputs = random_inputs(spec)
    arrays = (inputs.x, inputs.offset, inputs.mask)
    out = np.full(spec.output_shape, np.nan, inputs.x.dtype)
    executable["main"](*(tensors.to_kernel(array) for array in (*arrays, out)))
    reference = dcnv3_reference(*arrays, spec)
    error = np.abs(out.astype(np.float64) - reference)
    assert np.all(error <= operator_bound(spec, *arrays, reference))
