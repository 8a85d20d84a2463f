"""DCNv3 kernels scheduled and compiled for this machine, compared with the float64 reference."""

import dataclasses

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm.ir import IRModule

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.expr import KERNEL_ATTR
from dcnv3_tvm.op.reference import dcnv3_loops
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.tolerances import operator_bound
from helpers.operator import check, run
from helpers.specs import ONE_DRAW, Inputs, large_inputs, random_inputs, specs
from helpers.structure import block_names


def compile_kernels(kernels):
    """Compile kernels as one module, in a third of the time of one module each."""
    target = resolve_target("auto")
    named = {f"f{i}": k.with_attr("global_symbol", f"f{i}") for i, k in enumerate(kernels)}
    module, rules = schedule_module(IRModule(named), target)
    assert {found.rule for found in rules.values()} == {"dcnv3"}
    executable = tvm.compile(module, target=target)
    return [executable[name] for name in named]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@ONE_DRAW
@given(data=st.data())
def test_random_problems(dtype, data):
    """8 problems per dtype; every second one with softmax uses the packed kernel."""
    problems = data.draw(
        st.lists(specs(dtype), min_size=8, max_size=8, unique_by=lambda spec: spec.slug)
    )
    packed = [spec.softmax and i % 2 == 0 for i, spec in enumerate(problems)]
    kernels = compile_kernels(
        tensorir.dcnv3_packed(spec) if pack else tensorir.dcnv3(spec)
        for spec, pack in zip(problems, packed, strict=True)
    )
    for seed, (spec, pack, kernel) in enumerate(zip(problems, packed, kernels, strict=True)):
        inputs = random_inputs(spec, seed=seed)
        check(run(kernel, spec, inputs, pack), spec, inputs)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("sizes", [(2, 5, 7), (None, None, 7)], ids=str)
def test_center_feature(sizes, dtype):
    spec = DCNv3Spec.of((*sizes, 48), group=3, softmax=True, dtype=dtype)
    (kernel,) = compile_kernels([tensorir.dcnv3_packed(spec, center_feature=True)])
    static = dataclasses.replace(spec, batch=2, height=5, width=7)
    inputs = random_inputs(static, seed=6)
    gate = 4 * np.random.default_rng(7).standard_normal((2, 5, 7, 3))
    gate = gate.astype(inputs.x.dtype)
    check(run(kernel, static, inputs, packed=True, gate=gate), static, inputs, gate)


SYMBOLIC = {
    "all": (None, None, None),
    "batch": (None, 7, 9),
    "height": (2, None, 9),
    "width": (2, 7, None),
}
SIZES = [(1, 1, 1), (2, 7, 9), (5, 7, 9), (3, 1, 9), (1, 8, 1), (2, 7, 16), (2, 30, 9)]


@pytest.mark.parametrize("softmax", [False, True], ids=["mask", "logits"])
@pytest.mark.parametrize("sizes", SYMBOLIC.values(), ids=SYMBOLIC)
def test_symbolic_sizes(sizes, softmax):
    spec = DCNv3Spec.of((*sizes, 24), group=3, stride=(2, 1), offset_scale=1.5, softmax=softmax)
    (kernel,) = compile_kernels([tensorir.dcnv3(spec)])
    ran = 0
    for size in SIZES:
        if any(a not in (None, b) for a, b in zip(sizes, size, strict=True)):
            continue
        n, h, w = size
        static = dataclasses.replace(spec, batch=n, height=h, width=w)
        inputs = random_inputs(static, seed=ran)
        check(run(kernel, static, inputs), static, inputs)
        ran += 1
    assert ran >= 2


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("static", [True, False], ids=["static", "symbolic"])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (2, 2), (5, 6)], ids=str)
def test_reads_stay_inside_the_image(size, static, dtype):
    """NaN and infinite offsets contribute nothing; the NaN around the image is not read."""
    spec = DCNv3Spec.of((2, *size, 10), group=2, pad=2, dtype=dtype)
    shape = (2, *size, 10) if static else (None, None, None, 10)
    (kernel,) = compile_kernels(
        [tensorir.dcnv3(dataclasses.replace(spec, batch=shape[0], height=shape[1], width=shape[2]))]
    )
    plain = random_inputs(spec, seed=3)
    rng = np.random.default_rng(4)
    special = np.array([np.nan, np.inf, -np.inf, 6e4, -6e4]).astype(plain.offset.dtype)
    offset = np.where(
        rng.random(plain.offset.shape) < 0.3,
        special[rng.integers(0, len(special), plain.offset.shape)],
        plain.offset,
    )
    guard = plain.x.size
    guarded = np.full(guard * 3, np.nan, plain.x.dtype)
    x = guarded[guard : 2 * guard].reshape(plain.x.shape)
    x[...] = plain.x
    inputs = Inputs(x, offset, plain.mask)
    check(run(kernel, spec, inputs), spec, inputs)


def test_more_than_2_to_31_elements():
    spec, inputs = large_inputs()
    assert inputs.x.size > 2**31
    (kernel,) = compile_kernels([tensorir.dcnv3(spec)])
    out = run(kernel, spec, inputs)
    reference = dcnv3_loops(inputs.x, inputs.offset, inputs.mask, spec)
    assert np.abs(reference[1, -1, -1]).min() > 0
    window = inputs.x[:, :4, :4]
    bound = operator_bound(spec, window, inputs.offset, inputs.mask, reference)
    assert np.all(np.abs(out - reference) <= 2 * bound)


def test_softmax_is_stable():
    spec = DCNv3Spec.of((1, 4, 5, 6), group=2, softmax=True)
    inputs = random_inputs(spec)
    shifted = Inputs(inputs.x, inputs.offset, inputs.mask * np.float32(12) + np.float32(3e3))
    (kernel,) = compile_kernels([tensorir.dcnv3(spec)])
    check(run(kernel, spec, shifted), spec, shifted)


def test_packed_kernel_requires_softmax():
    with pytest.raises(InvalidArgumentError, match="takes mask logits"):
        tensorir.dcnv3_packed(DCNv3Spec.of((1, 4, 5, 6), group=2))


def test_width_beyond_float32_integers_raises():
    with pytest.raises(InvalidArgumentError, match="width is too large"):
        tensorir.dcnv3(DCNv3Spec.of((1, 1, 2**24 + 1, 1), group=1))


SOFTMAX_BLOCKS = ["softmax_max", "softmax_exp", "softmax_sum"]
WEIGHT_BLOCKS = ["coordinates", "corners", "weights"]
SCALAR_BLOCKS = [
    *("softmax_max", "softmax_shift", "softmax_exp", "softmax_sum", "offsets"),
    *(*WEIGHT_BLOCKS, "pixels", "softmax_share"),
]


@pytest.mark.parametrize("vector_loads", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("build", [tensorir.dcnv3, tensorir.dcnv3_packed])
def test_name_blocks_and_attributes(build, vector_loads):
    spec = DCNv3Spec.of((1, 4, 5, 6), group=2, softmax=True)
    func = build(spec, vector_loads=vector_loads)
    before = [*SOFTMAX_BLOCKS, *WEIGHT_BLOCKS, "pixels", "patch"] if vector_loads else SCALAR_BLOCKS
    expected = [*before, "sum", "store"]
    assert block_names(func)[1:] == expected  # after the root block
    assert func.attrs[KERNEL_ATTR] == build.__name__
    assert tensorir.spec_of(func) == spec
    assert func.attrs["global_symbol"] == build.__name__


@pytest.mark.parametrize("vector_loads", [False, True], ids=["scalar", "vector"])
def test_blocks_of_the_center_feature(vector_loads):
    spec = DCNv3Spec.of((1, 4, None, 6), group=2, softmax=True)
    func = tensorir.dcnv3_packed(spec, center_feature=True, vector_loads=vector_loads)
    if vector_loads:
        added = [*SOFTMAX_BLOCKS, *WEIGHT_BLOCKS, "pixels", "patch", "center"]
    else:
        added = SCALAR_BLOCKS
    assert set(block_names(func)[1:]) == {*added, "gate", "sum", "store"}
