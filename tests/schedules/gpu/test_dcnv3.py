"""The GPU's schedule of DCNv3 against float64."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tvm import s_tir

from dcnv3_tvm.gpu import VECTOR_BYTES
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules.gpu.dcnv3 import dcnv3
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from helpers import operator
from helpers.gpu_kernels import gemm
from helpers.operator import check
from helpers.specs import Inputs, random_inputs, specs

TARGET = resolve_target("cuda-sm90")


def run(gpu, kernel, spec, inputs, packed=False, gate=None, space=None):
    arrays = operator.arguments(spec, inputs, packed, gate)
    outputs = [(operator.output_shape(spec, inputs), spec.dtype)]
    (result,) = gpu.run(dcnv3(kernel, TARGET, space or SearchSpace()), TARGET, arrays, outputs)
    return result


def gate_for(spec, inputs):
    shape = (*inputs.x.shape[:3], spec.group)
    return (4 * np.random.default_rng(7).standard_normal(shape)).astype(inputs.x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@settings(
    max_examples=1,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_problems(run_together, dtype, data):
    """Odd sizes, borders, strides, any channels of a group; with logits every second one packed."""
    drawn = data.draw(
        st.lists(specs(dtype), min_size=16, max_size=16, unique_by=lambda spec: spec.slug)
    )
    problems = {}
    for seed, spec in enumerate(drawn):
        packed = spec.softmax and seed % 2 == 0
        kernel = tensorir.dcnv3_packed(spec) if packed else tensorir.dcnv3(spec)
        inputs = random_inputs(spec, seed=seed)
        problems[f"problem{seed}"] = (
            dcnv3(kernel, TARGET, SearchSpace()),
            operator.arguments(spec, inputs, packed),
            (operator.output_shape(spec, inputs), dtype),
            (spec, inputs),
        )
    for _, result, (spec, inputs) in run_together(TARGET, problems):
        check(result, spec, inputs)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((2, 9, 11, 64), 4),
        ((1, 14, 14, 256), 16),
        ((1, 7, 7, 512), 32),
        ((1, 10, 6, 320), 10),
        ((3, 1, 1, 64), 4),
        ((1, 5, 3, 4), 1),
    ],
    ids=str,
)
def test_shapes_of_released_models(gpu, shape, group, dtype):
    """Pixels that fill no block, 16 and 32 channels a group, more groups than a block; one pixel.

    A small image comes down to one pixel in the last stage.
    """
    spec = dataclasses.replace(DCNv3Spec.of(shape, group=group, dtype=dtype), softmax=True)
    inputs = random_inputs(spec, seed=5)
    check(run(gpu, tensorir.dcnv3_packed(spec), spec, inputs, packed=True), spec, inputs)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "group"), [((1, 9, 5, 96), 3), ((2, 5, 7, 24), 6)], ids=str)
def test_blend_with_the_input(gpu, shape, group, dtype):
    spec = dataclasses.replace(DCNv3Spec.of(shape, group=group, dtype=dtype), softmax=True)
    kernel = tensorir.dcnv3_packed(spec, center_feature=True)
    inputs = random_inputs(spec, seed=6)
    gate = gate_for(spec, inputs)
    check(run(gpu, kernel, spec, inputs, packed=True, gate=gate), spec, inputs, gate)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "group", "block", "options"),
    [
        ((2, 5, 7, 64), 4, (4, 5), {}),
        ((1, 6, 8, 48), 3, (1, 8), {}),
        ((1, 3, 4, 256), 8, (8, 4), {"kernel_size": (5, 5), "pad": 2}),
        ((3, 8, 4, 80), 5, (5, 4), {"stride": (2, 1), "softmax": False}),
        ((None, 3, 5, 64), 4, (4, 1), {"remove_center": True}),
    ],
    ids=str,
)
def test_partners(gpu, shape, group, block, options, dtype):
    """Along groups, or columns where the groups are odd; loops over points; no whole last warp."""
    spec = DCNv3Spec.of(shape, group=group, dtype=dtype, **options)
    packed = "softmax" not in options
    spec = dataclasses.replace(spec, softmax=packed)
    groups, pixels = block
    space = SearchSpace({"thread": "partners", "groups": groups, "pixels": pixels})
    known = dataclasses.replace(spec, batch=spec.batch or 2)
    inputs = random_inputs(known, seed=8)
    blended = known.output_size == (known.height, known.width) and packed
    gate = gate_for(known, inputs) if blended else None
    kernel = tensorir.dcnv3_packed(spec, center_feature=blended) if packed else tensorir.dcnv3(spec)
    check(run(gpu, kernel, known, inputs, packed, gate, space), known, inputs, gate)
    scheduled = dcnv3(kernel, TARGET, SearchSpace(space.given))
    assert 'scope="warp"' in scheduled.script()


def test_partners_without_whole_blocks_are_refused():
    spec = DCNv3Spec.of((1, 5, 7, 64), group=4, dtype="float16")
    for block in ({"groups": 1, "pixels": 1}, {"groups": 4, "pixels": 2}):
        with pytest.raises(DecisionError, match="partners need whole blocks"):
            dcnv3(tensorir.dcnv3(spec), TARGET, SearchSpace({"thread": "partners"} | block))


def test_large_problems_get_partners():
    spec = DCNv3Spec.of((64, 56, 56, 64), group=4, dtype="float16")
    for batch, thread in ((64, "partners"), (1, "vector")):
        space = SearchSpace()
        dcnv3(tensorir.dcnv3(dataclasses.replace(spec, batch=batch)), TARGET, space)
        assert space.candidates["thread"][0] == thread


def test_any_batch(gpu):
    spec = DCNv3Spec.of((None, 7, 9, 32), group=2)
    for batch in (1, 3):
        static = dataclasses.replace(spec, batch=batch)
        inputs = random_inputs(static, seed=batch)
        check(run(gpu, tensorir.dcnv3(spec), static, inputs), static, inputs)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((None, None, None), {}),
        ((2, None, None), {"stride": (2, 1), "pad": 2, "dilation": (1, 2)}),
        ((None, None, 7), {"offset_scale": 0.5}),
        ((1, 6, None), {"remove_center": True}),
    ],
    ids=str,
)
def test_any_size(gpu, given, options, dtype):
    """Rows longer and shorter than what a block takes; images of one row, column and pixel."""
    spec = dataclasses.replace(
        DCNv3Spec.of((*given, 64), group=4, dtype=dtype, **options), softmax=True
    )
    scheduled = dcnv3(tensorir.dcnv3_packed(spec), TARGET, SearchSpace())
    functions, cases, problems = {}, {}, {}
    for number, sizes in enumerate([(3, 5, 37), (1, 1, 9), (2, 4, 1), (1, 1, 1)]):
        known = (size or other for size, other in zip(given, sizes, strict=True))
        fields = dict(zip(("batch", "height", "width"), known, strict=True))
        static = dataclasses.replace(spec, **fields)
        inputs = random_inputs(static, seed=number)
        name = f"size{number}"
        functions[name], problems[name] = scheduled, (static, inputs)
        shape = operator.output_shape(static, inputs)
        cases[name] = (operator.arguments(static, inputs, packed=True), [(shape, dtype)])
    for name, (result,) in gpu.run_all(functions, TARGET, cases).items():
        check(result, *problems[name])


def test_one_launch_and_vectors():
    spec = DCNv3Spec.of((64, 56, 56, 64), group=4, dtype="float16")
    text = dcnv3(tensorir.dcnv3(spec), TARGET, SearchSpace()).script()
    assert text.count('"blockIdx.x"') == 1
    assert "T.vectorized(T.int64(8))" in text


def test_open_sizes_are_gathered_in_vectors():
    spec = DCNv3Spec.of((None, None, None, 64), group=4, dtype="float16")
    text = dcnv3(tensorir.dcnv3(spec), TARGET, SearchSpace()).script()
    assert (text.count('"blockIdx.x"'), text.count('"blockIdx.y"')) == (1, 1)
    assert "T.vectorized(T.int64(8))" in text


def test_refuses_other_kernels():
    other = gemm((8,), 16, 16, dtype="float16")
    assert dcnv3(other, TARGET, SearchSpace()) == Refusal(
        "schedules kernels 'dcnv3' and 'dcnv3_packed'; this is 'gemm'"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nothing_outside_is_read(gpu, dtype):
    """NaN and infinite offsets drop their points; what they read lies in the image."""
    spec = DCNv3Spec.of((2, 5, 6, 32), group=2, pad=2, dtype=dtype)
    plain = random_inputs(spec, seed=3)
    rng = np.random.default_rng(4)
    special = np.array([np.nan, np.inf, -np.inf, 6e4, -6e4]).astype(plain.offset.dtype)
    drawn = special[rng.integers(0, len(special), plain.offset.shape)]
    offset = np.where(rng.random(plain.offset.shape) < 0.3, drawn, plain.offset)
    inputs = Inputs(plain.x, offset, plain.mask)
    check(run(gpu, tensorir.dcnv3(spec), spec, inputs), spec, inputs)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_copies_in_registers_are_aligned_for_vectors(dtype):
    spec = dataclasses.replace(DCNv3Spec.of((64, 56, 56, 64), group=4, dtype=dtype), softmax=True)
    for kernel in (tensorir.dcnv3_packed(spec), tensorir.dcnv3(spec)):
        scheduled = s_tir.Schedule(dcnv3(kernel, TARGET, SearchSpace()))
        buffers = scheduled.get(scheduled.get_sblock("root")).alloc_buffers
        assert {buffer.name for buffer in buffers} >= {"out_local", "patch_local"}
        assert all(buffer.data_alignment % VECTOR_BYTES == 0 for buffer in buffers)
