"""The GPU schedules of the gradients of DCNv3: results compared with the reference, structure."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import s_tir

from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules import apply_rules
from dcnv3_tvm.schedules.gpu.launch import launches
from dcnv3_tvm.schedules.space import DecisionError
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from helpers.gradients import check_gradients, result_gradient
from helpers.specs import ONE_DRAW, Inputs, random_inputs, specs

TARGET = resolve_target("cuda-sm90")
KINDS = ("dcnv3_grad_x", "dcnv3_grad_offset_mask")
ATOMIC_ROUNDINGS = 1e-5
"""Difference of sums of some hundred float32 terms in two orders."""


def schedule(kind, spec, decisions=None):
    function = getattr(tensorir, kind)(spec, vector_loads=True)
    found = apply_rules(function, TARGET, decisions)
    assert found.rule == kind
    return found.function


def check_problems(gpu, problems, decisions=None, compiled=None):
    """Run both kernels on problems ``(spec, inputs)``, and check the gradients.

    `decisions` are those of each kind; `compiled` is a problem of dynamic sizes whose kernels
    compute all of `problems`.
    """
    decisions = decisions or {}
    functions, cases, grads = {}, {}, []
    made = {kind: schedule(kind, compiled, decisions.get(kind)) for kind in KINDS if compiled}
    for number, (spec, inputs) in enumerate(problems):
        x, offset, mask = inputs.x, inputs.offset, inputs.mask
        grads.append(result_gradient(spec, inputs))
        x_out = (x.shape, spec.accumulate_dtype)
        others = [(array.shape, spec.dtype) for array in (offset, mask)]
        arguments = [
            ([grads[-1], offset, mask], [x_out]),
            ([x, offset, mask, grads[-1]], others),
        ]
        for kind, case in zip(KINDS, arguments, strict=True):
            name = f"{kind}_{number}"
            functions[name] = made.get(kind) or schedule(kind, spec, decisions.get(kind))
            cases[name] = case
    found = gpu.run_all(functions, TARGET, cases, allowed=ATOMIC_ROUNDINGS)
    checked = []
    for number, ((spec, inputs), grad) in enumerate(zip(problems, grads, strict=True)):
        checked.append([array for kind in KINDS for array in found[f"{kind}_{number}"]])
        check_gradients(checked[-1], spec, inputs, grad)
    return checked


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@ONE_DRAW
@given(data=st.data())
def test_random_problems(gpu, dtype, data):
    drawn = data.draw(
        st.lists(specs(dtype), min_size=2, max_size=2, unique_by=lambda spec: spec.slug)
    )
    check_problems(gpu, [(spec, random_inputs(spec, seed=i)) for i, spec in enumerate(drawn)])


def test_partial_blocks(gpu):
    """A block has a part of a row and of the groups; threads have vectors of four channels."""
    spec = DCNv3Spec.of((2, 3, 7, 64), group=4, kernel_size=(2, 1), softmax=True, dtype="float16")
    decisions = {kind: {"pixels": 4, "groups": 2} for kind in KINDS}
    check_problems(gpu, [(spec, random_inputs(spec))], decisions)


SHARING = {"thread": "share_points"}


@pytest.mark.parametrize(
    ("width", "sizes", "decisions"),
    [
        (None, [(2, 3, 37), (1, 1, 1)], {}),
        (7, [(2, 3, 7)], {"dcnv3_grad_x": SHARING}),
    ],
    ids=["all", "batch and height"],
)
def test_dynamic_sizes(gpu, width, sizes, decisions):
    """Rows longer than a block, and one pixel; threads of a group that share points."""
    options = {"kernel_size": (1, 2), "pad": 1, "softmax": True}
    spec = DCNv3Spec.of((None, None, width, 16), group=2, **options)
    problems = []
    for seed, (batch, height, columns) in enumerate(sizes):
        known = dataclasses.replace(spec, batch=batch, height=height, width=columns)
        problems.append((known, random_inputs(known, seed=seed)))
    check_problems(gpu, problems, decisions, compiled=spec)


@pytest.mark.parametrize(("channels", "group"), [(24, 6), (12, 3)], ids=["groups", "columns"])
def test_threads_share_points(gpu, channels, group):
    """Several rows and a partial warp, and vectors of two channels."""
    spec = DCNv3Spec.of(
        (1, 5, 6, channels), group=group, kernel_size=(2, 1), pad=0, dtype="float64"
    )
    decisions = {"dcnv3_grad_x": {**SHARING, "pixels": 12, "groups": group // 3}}
    check_problems(gpu, [(spec, random_inputs(spec))], decisions)
    for block in ({"groups": 1, "pixels": 1}, {"groups": group, "pixels": 4}):
        with pytest.raises(DecisionError, match="only in blocks without absent pixels"):
            schedule("dcnv3_grad_x", spec, {**SHARING, **block})


def test_points_outside_the_image_have_no_gradient(gpu):
    """NaN, infinite and far offsets; the NaN around the image is neither read nor written."""
    spec = DCNv3Spec.of((2, 5, 6, 8), group=2, kernel_size=(1, 2), pad=2, dtype="float64")
    plain = random_inputs(spec, seed=3)
    rng = np.random.default_rng(4)
    special = np.array([np.nan, np.inf, -np.inf, 6e4, -6e4])
    chosen = rng.random(plain.offset.shape) < 0.3
    offset = np.where(chosen, special[rng.integers(0, 5, plain.offset.shape)], plain.offset)
    inputs = Inputs(plain.x, offset, plain.mask)
    ((_, grad_offset, grad_mask),) = check_problems(gpu, [(spec, inputs)])
    outside = chosen.reshape(*grad_mask.shape, 2).any(axis=-1)
    assert not grad_mask[outside].any()
    assert not grad_offset.reshape(*grad_mask.shape, 2)[outside].any()


def test_index_of_more_than_2_to_31_vectors():
    for batch, dtype in ((64, "int32"), (256, "int64")):
        spec = DCNv3Spec.of((batch, 1024, 1024, 64), group=4)
        for kind in KINDS:
            scheduled = s_tir.Schedule(schedule(kind, spec))
            buffers = scheduled.get(scheduled.get_sblock("root")).alloc_buffers
            assert {str(b.dtype) for b in buffers if b.name == "index_local"} == {dtype}


def test_launches():
    spec = DCNv3Spec.of((64, 56, 56, 64), group=4)
    zero, scatter = launches(schedule("dcnv3_grad_x", spec))
    assert zero == {"blockIdx.x": "14336", "threadIdx.x": "256"}
    assert scatter == {"blockIdx.x": "7168", "threadIdx.y": "28", "threadIdx.x": "4"}
    (launch,) = launches(schedule("dcnv3_grad_offset_mask", spec))
    assert launch == {"blockIdx.x": "7168", "threadIdx.x": "112"}


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_the_variant_for_cpus(kind):
    function = getattr(tensorir, kind)(DCNv3Spec.of((1, 4, 5, 8), group=2))
    refusal = apply_rules(function, TARGET).refusals[kind]
    assert refusal == "needs the kernel variant with vector loads; this is the one for CPUs"
