"""The GPU schedule of DCNv3: its results compared with the reference, and its structure."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import s_tir, tirx

from dcnv3_tvm.gpu import VECTOR_BYTES
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules.gpu.dcnv3 import dcnv3
from dcnv3_tvm.schedules.gpu.launch import launches
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from helpers import operator
from helpers.gpu_kernels import gemm
from helpers.operator import check
from helpers.specs import ONE_DRAW, Inputs, random_inputs, specs
from helpers.structure import buffer_scopes, nodes

TARGET = resolve_target("cuda-sm90")


def build_kernel(spec, packed=False, center_feature=False):
    if packed:
        return tensorir.dcnv3_packed(spec, center_feature=center_feature, vector_loads=True)
    return tensorir.dcnv3(spec, vector_loads=True)


def problem(spec, inputs, packed=False, gate=None, kernel=None):
    """Return the scheduled kernel, its inputs and output, and what `check` compares with."""
    if kernel is None:
        kernel = dcnv3(build_kernel(spec, packed, gate is not None), TARGET, SearchSpace())
    arrays = operator.arguments(spec, inputs, packed, gate)
    output = (operator.output_shape(spec, inputs), spec.dtype)
    return kernel, arrays, output, (spec, inputs, gate)


def check_all(results):
    for _, result, (spec, inputs, gate) in results:
        check(result, spec, inputs, gate)


def vector_widths(func):
    """Return the extents of the vectorized loops of a scheduled function."""
    loops = nodes(func.body, tirx.For)
    return {int(loop.extent) for loop in loops if loop.kind == tirx.ForKind.VECTORIZED}


def gate_for(spec, inputs):
    shape = (*inputs.x.shape[:3], spec.group)
    return (4 * np.random.default_rng(7).standard_normal(shape)).astype(inputs.x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@ONE_DRAW
@given(data=st.data())
def test_random_problems(run_together, dtype, data):
    """Odd sizes, strides and channels; every second problem with softmax uses the packed kernel."""
    drawn = data.draw(
        st.lists(specs(dtype), min_size=10, max_size=10, unique_by=lambda spec: spec.slug)
    )
    problems = {}
    for seed, spec in enumerate(drawn):
        packed = spec.softmax and seed % 2 == 0
        problems[f"problem{seed}"] = problem(spec, random_inputs(spec, seed=seed), packed)
    check_all(run_together(TARGET, problems))


MODEL_SHAPES = [
    ((2, 9, 11, 64), 4),
    ((1, 14, 14, 256), 16),
    ((1, 7, 7, 512), 32),
    ((1, 10, 6, 320), 10),
    ((3, 1, 1, 64), 4),
    ((1, 5, 3, 4), 1),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shapes_of_released_models(run_together, dtype):
    """Partial blocks, 16 and 32 channels per group, more groups than a block has, one pixel.

    A small image is reduced to one pixel in the last stage.
    """
    problems = {}
    for shape, group in MODEL_SHAPES:
        spec = dataclasses.replace(DCNv3Spec.of(shape, group=group, dtype=dtype), softmax=True)
        name = "_".join(map(str, ("of", *shape)))
        problems[name] = problem(spec, random_inputs(spec, seed=5), packed=True)
    check_all(run_together(TARGET, problems))


def test_center_feature(run_together):
    problems = {}
    for dtype in ("float32", "float16", "bfloat16"):
        for shape, group in (((1, 9, 5, 96), 3), ((2, 5, 7, 24), 6)):
            spec = dataclasses.replace(DCNv3Spec.of(shape, group=group, dtype=dtype), softmax=True)
            inputs = random_inputs(spec, seed=6)
            name = f"{dtype}_{group}"
            problems[name] = problem(spec, inputs, packed=True, gate=gate_for(spec, inputs))
    check_all(run_together(TARGET, problems))


SHARED_POINTS = [
    ((2, 5, 7, 64), 4, (4, 5), {}),
    ((1, 6, 8, 48), 3, (1, 8), {}),
    ((1, 3, 4, 256), 8, (8, 4), {"kernel_size": (5, 5), "pad": 2}),
    ((3, 8, 4, 80), 5, (5, 4), {"stride": (2, 1), "softmax": False}),
    ((None, 3, 5, 64), 4, (4, 1), {"remove_center": True}),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_threads_share_points(run_together, dtype):
    """Sharing along groups, or columns if groups are odd; a loop over points; a partial warp."""
    problems = {}
    for shape, group, (groups, pixels), options in SHARED_POINTS:
        spec = DCNv3Spec.of(shape, group=group, dtype=dtype, **options)
        packed = "softmax" not in options
        spec = dataclasses.replace(spec, softmax=packed)
        space = SearchSpace({"thread": "share_points", "groups": groups, "pixels": pixels})
        known = dataclasses.replace(spec, batch=spec.batch or 2)
        inputs = random_inputs(known, seed=8)
        blended = known.output_size == (known.height, known.width) and packed
        gate = gate_for(known, inputs) if blended else None
        kernel = build_kernel(spec, packed, center_feature=blended)
        made = problem(known, inputs, packed, gate, kernel=dcnv3(kernel, TARGET, space))
        assert "warp" in buffer_scopes(made[0])
        problems[f"of_{shape[-1]}_{group}"] = made
    check_all(run_together(TARGET, problems))


def test_sharing_points_with_absent_pixels_raises():
    spec = DCNv3Spec.of((1, 5, 7, 64), group=4, dtype="float16")
    for block in ({"groups": 1, "pixels": 1}, {"groups": 4, "pixels": 2}):
        with pytest.raises(DecisionError, match="only in blocks without absent pixels"):
            dcnv3(build_kernel(spec), TARGET, SearchSpace({"thread": "share_points"} | block))


def test_threads_share_points_of_large_problems_by_default():
    spec = DCNv3Spec.of((64, 56, 56, 64), group=4, dtype="float16")
    for batch, thread in ((64, "share_points"), (1, "one_vector")):
        space = SearchSpace()
        dcnv3(build_kernel(dataclasses.replace(spec, batch=batch)), TARGET, space)
        assert space.candidates["thread"][0] == thread


def test_threads_do_not_share_one_point():
    spec = DCNv3Spec.of((64, 56, 56, 64), group=4, kernel_size=1, pad=0, softmax=True)
    space = SearchSpace()
    dcnv3(build_kernel(spec), TARGET, space)
    assert space.candidates["thread"] == ("two_vectors", "one_vector")


def test_dynamic_batch(run_together):
    spec = DCNv3Spec.of((None, 7, 9, 32), group=2)
    scheduled = dcnv3(build_kernel(spec), TARGET, SearchSpace())
    problems = {}
    for batch in (1, 3):
        static = dataclasses.replace(spec, batch=batch)
        inputs = random_inputs(static, seed=batch)
        problems[f"of_{batch}"] = problem(static, inputs, kernel=scheduled)
    check_all(run_together(TARGET, problems))


@pytest.mark.parametrize(
    ("given", "dtype", "options"),
    [
        ((None, None, None), "float32", {}),
        ((None, None, None), "float16", {}),
        ((2, None, None), "float16", {"stride": (2, 1), "pad": 2, "dilation": (1, 2)}),
        ((None, None, 7), "float32", {"offset_scale": 0.5}),
        ((1, 6, None), "float16", {"remove_center": True}),
    ],
    ids=str,
)
def test_dynamic_sizes(run_together, given, options, dtype):
    """Rows longer and shorter than those of a block; images of one row, column and pixel."""
    spec = dataclasses.replace(
        DCNv3Spec.of((*given, 64), group=4, dtype=dtype, **options), softmax=True
    )
    scheduled = dcnv3(build_kernel(spec, packed=True), TARGET, SearchSpace())
    problems = {}
    for number, sizes in enumerate([(3, 5, 37), (1, 1, 9), (2, 4, 1), (1, 1, 1)]):
        known = (size or other for size, other in zip(given, sizes, strict=True))
        fields = dict(zip(("batch", "height", "width"), known, strict=True))
        static = dataclasses.replace(spec, **fields)
        inputs = random_inputs(static, seed=number)
        problems[f"size{number}"] = problem(static, inputs, packed=True, kernel=scheduled)
    check_all(run_together(TARGET, problems))


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ((64, 56, 56), {"blockIdx.x", "threadIdx.x", "threadIdx.y"}),
        ((None, None, None), {"blockIdx.x", "blockIdx.y", "threadIdx.x"}),
    ],
    ids=["static", "dynamic"],
)
def test_one_launch_with_vector_loads(sizes, axes):
    spec = DCNv3Spec.of((*sizes, 64), group=4, dtype="float16")
    scheduled = dcnv3(build_kernel(spec), TARGET, SearchSpace())
    (launch,) = launches(scheduled)
    assert launch.keys() == axes
    assert 8 in vector_widths(scheduled)


def test_refuses_other_kernels():
    found = dcnv3(gemm((8,), 16, 16, dtype="float16"), TARGET, SearchSpace())
    assert found == Refusal("schedules kernels 'dcnv3' and 'dcnv3_packed'; this is 'gemm'")


def test_refuses_the_variant_for_cpus():
    found = dcnv3(tensorir.dcnv3(DCNv3Spec.of((1, 4, 5, 8), group=2)), TARGET, SearchSpace())
    assert found == Refusal("needs the kernel variant with vector loads; this is the one for CPUs")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_reads_stay_inside_the_image(run_together, dtype):
    """NaN and infinite offsets contribute nothing; their reads are inside the image."""
    spec = DCNv3Spec.of((2, 5, 6, 32), group=2, pad=2, dtype=dtype)
    plain = random_inputs(spec, seed=3)
    rng = np.random.default_rng(4)
    special = np.array([np.nan, np.inf, -np.inf, 6e4, -6e4]).astype(plain.offset.dtype)
    drawn = special[rng.integers(0, len(special), plain.offset.shape)]
    offset = np.where(rng.random(plain.offset.shape) < 0.3, drawn, plain.offset)
    inputs = Inputs(plain.x, offset, plain.mask)
    check_all(run_together(TARGET, {"special": problem(spec, inputs)}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_register_buffers_are_aligned_for_vector_loads(dtype):
    spec = dataclasses.replace(DCNv3Spec.of((64, 56, 56, 64), group=4, dtype=dtype), softmax=True)
    for packed in (True, False):
        scheduled = s_tir.Schedule(dcnv3(build_kernel(spec, packed), TARGET, SearchSpace()))
        buffers = scheduled.get(scheduled.get_sblock("root")).alloc_buffers
        assert {buffer.name for buffer in buffers} >= {"out_local", "patch_local"}
        assert all(buffer.data_alignment % VECTOR_BYTES == 0 for buffer in buffers)
