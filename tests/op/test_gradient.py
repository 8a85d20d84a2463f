"""Gradient kernels of DCNv3, compared with the float64 reference, and that with differences."""

import dataclasses

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm.ir import IRModule

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.reference import dcnv3_loops
from dcnv3_tvm.op.reference_gradient import dcnv3_gradients
from dcnv3_tvm.runtime.tensors import to_kernel
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from helpers.gradients import check_gradients, result_gradient
from helpers.guarded import GuardedOutput
from helpers.specs import ONE_DRAW, Inputs, large_inputs, random_inputs, specs

KINDS = (tensorir.dcnv3_grad_x, tensorir.dcnv3_grad_offset_mask)


def compile_gradients(problems):
    """Compile both kernels of some problems as one module."""
    target = resolve_target("auto")
    kernels = {f"{k.__name__}_{i}": k(spec) for i, spec in enumerate(problems) for k in KINDS}
    named = {name: k.with_attr("global_symbol", name) for name, k in kernels.items()}
    module, taken = schedule_module(IRModule(named), target)
    assert {found.rule for found in taken.values()} == {kind.__name__ for kind in KINDS}
    executable = tvm.compile(module, target=target)
    return [[executable[f"{k.__name__}_{i}"] for k in KINDS] for i in range(len(problems))]


def run(kernels, spec, inputs, grad):
    """Run both kernels on poisoned, guarded outputs."""
    grad_x = GuardedOutput(inputs.x.shape, spec.accumulate_dtype)
    others = [GuardedOutput(like.shape, spec.dtype) for like in (inputs.offset, inputs.mask)]
    x, offset, mask, grad = map(to_kernel, (inputs.x, inputs.offset, inputs.mask, grad))
    kernels[0](grad, offset, mask, grad_x.argument)
    kernels[1](x, offset, mask, grad, *(out.argument for out in others))
    return [out.checked() for out in (grad_x, *others)]


def check_compiled(spec, inputs, compiled=None):
    (kernels,) = compile_gradients([compiled or spec])
    grad = result_gradient(spec, inputs)
    results = run(kernels, spec, inputs, grad)
    check_gradients(results, spec, inputs, grad)
    return results


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@ONE_DRAW
@given(data=st.data())
def test_random_problems(dtype, data):
    problems = data.draw(
        st.lists(specs(dtype), min_size=2, max_size=2, unique_by=lambda spec: spec.slug)
    )
    for seed, (spec, kernels) in enumerate(zip(problems, compile_gradients(problems), strict=True)):
        inputs = random_inputs(spec, seed=seed)
        grad = result_gradient(spec, inputs)
        check_gradients(run(kernels, spec, inputs, grad), spec, inputs, grad)


@pytest.mark.parametrize("softmax", [False, True], ids=["mask", "logits"])
@pytest.mark.parametrize("sizes", [(None, None, None), (None, None, 9)], ids=str)
def test_symbolic_sizes(sizes, softmax):
    spec = DCNv3Spec.of((*sizes, 48), group=3, stride=(2, 1), offset_scale=1.5, softmax=softmax)
    (kernels,) = compile_gradients([spec])
    for seed, size in enumerate([(2, 7, 9), (1, 1, 9)]):
        static = dataclasses.replace(
            spec, **dict(zip(("batch", "height", "width"), size, strict=True))
        )
        inputs = random_inputs(static, seed=seed)
        grad = result_gradient(static, inputs)
        check_gradients(run(kernels, static, inputs, grad), static, inputs, grad)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (5, 6)], ids=str)
def test_points_outside_the_image_have_no_gradient(size):
    """NaN and infinite offsets; the NaN around the image is not read."""
    spec = DCNv3Spec.of((2, *size, 10), group=2, pad=2)
    plain = random_inputs(spec, seed=3)
    rng = np.random.default_rng(4)
    special = np.array([np.nan, np.inf, -np.inf, 6e4, -6e4], np.float32)
    chosen = rng.random(plain.offset.shape) < 0.3
    offset = np.where(chosen, special[rng.integers(0, 5, plain.offset.shape)], plain.offset)
    guarded = np.full(plain.x.size * 3, np.nan, plain.x.dtype)
    x = guarded[plain.x.size : 2 * plain.x.size].reshape(plain.x.shape)
    x[...] = plain.x
    _, grad_offset, grad_mask = check_compiled(spec, Inputs(x, offset, plain.mask))
    outside = chosen.reshape(*grad_mask.shape, 2).any(axis=-1)
    assert not grad_mask[outside].any()
    assert not grad_offset.reshape(*grad_mask.shape, 2)[outside].any()


def at_kinks(spec, seed):
    """Return inputs whose points are all at integer positions, many at -1 and at the last pixel."""
    inputs = random_inputs(spec, seed=seed)
    offset = np.random.default_rng(seed).integers(-3, 4, inputs.offset.shape)
    return dataclasses.replace(inputs, offset=offset.astype(inputs.x.dtype))


def test_gradients_at_kinks_are_those_to_the_right():
    borders = 0
    for size in ((1, 1), (3, 4)):
        spec = DCNv3Spec.of((1, *size, 4), group=2, dtype="float64")
        inputs, step = at_kinks(spec, 5), 1e-6
        grad = result_gradient(spec, inputs)
        gradient = dcnv3_gradients(grad, inputs.x, inputs.offset, inputs.mask, spec).offset
        start = (dcnv3_loops(inputs.x, inputs.offset, inputs.mask, spec) * grad).sum()
        for place in np.ndindex(inputs.offset.shape):
            moved = inputs.offset.copy()
            moved[place] += step
            loss = (dcnv3_loops(inputs.x, moved, inputs.mask, spec) * grad).sum()
            difference = (loss - start) / step
            point, axis = place[3] // 2 % spec.points, place[3] % 2  # axis 0 is x
            grid = spec.kernel_points[point][axis] - 1
            if place[2 - axis] + grid + inputs.offset[place] == -1:
                assert gradient[place] == 0
                borders += difference != 0
            else:
                np.testing.assert_allclose(gradient[place], difference, atol=1e-8)
    assert borders


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kernels_at_kinks(dtype):
    spec = DCNv3Spec.of((1, 3, 4, 4), group=2, dtype=dtype)
    inputs = at_kinks(spec, 5)
    (kernels,) = compile_gradients([spec])
    grad = result_gradient(spec, inputs)
    result = run(kernels, spec, inputs, grad)[1].astype(np.float64)
    expected = dcnv3_gradients(grad, inputs.x, inputs.offset, inputs.mask, spec).offset
    # Positions are exact, so that what is left is the rounding of sums and of the result.
    np.testing.assert_allclose(result, expected, rtol=2.0**-11, atol=1e-5)


@pytest.mark.parametrize("softmax", [False, True], ids=["mask", "logits"])
def test_reference_matches_differences(softmax):
    spec = DCNv3Spec.of(
        (1, 4, 3, 4),
        group=2,
        kernel_size=(3, 2),
        stride=(2, 1),
        offset_scale=-0.7,
        softmax=softmax,
        dtype="float64",
    )
    inputs, step = random_inputs(spec, seed=1, spread=1.0), 1e-6
    grad = result_gradient(spec, inputs)
    arrays = [inputs.x, inputs.offset, inputs.mask]
    gradients = dcnv3_gradients(grad, *arrays, spec)
    for number, gradient in enumerate(gradients):
        for place in np.ndindex(gradient.shape):
            losses = []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[number][place] += sign * step
                losses.append((dcnv3_loops(*moved, spec) * grad).sum())
            difference = (losses[0] - losses[1]) / (2 * step)
            np.testing.assert_allclose(gradient[place], difference, atol=1e-7)


def test_same_bits_with_any_number_of_threads():
    spec = DCNv3Spec.of((2, 9, 8, 32), group=2)
    (kernels,) = compile_gradients([spec])
    inputs = random_inputs(spec)
    grad = result_gradient(spec, inputs)
    config = tvm.get_global_func("runtime.config_threadpool")
    results = []
    for threads in (1, 2, 3):
        config(1, threads)
        results.append(run(kernels, spec, inputs, grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_more_than_2_to_31_elements():
    spec, inputs = large_inputs()
    assert inputs.x.size > 2**31
    module, _ = schedule_module(
        IRModule({"main": tensorir.dcnv3_grad_offset_mask(spec)}), resolve_target("auto")
    )
    kernel = tvm.compile(module, target=resolve_target("auto"))["main"]
    grad = result_gradient(spec, inputs)
    outs = [GuardedOutput(like.shape, spec.dtype) for like in (inputs.offset, inputs.mask)]
    arrays = [inputs.x, inputs.offset, inputs.mask, grad]
    kernel(*map(to_kernel, arrays), *(out.argument for out in outs))
    # The last output pixel of the last image, moved to a small image with the same pixels.
    last = DCNv3Spec.of((1, 14, 14, 64), group=2, pad=0, stride=20, dtype="float16")
    corner = [array[1:, -1:, -1:] for array in (inputs.offset, inputs.mask, grad)]
    window = inputs.x[1:, 4893:4907, 3293:3307]
    moved = corner[0].astype(np.float64) + 6
    expected = dcnv3_gradients(corner[2], window, moved, corner[1], last)
    assert np.abs(expected.mask).min() > 0
    np.testing.assert_allclose(
        outs[1].checked()[1:, -1:, -1:], expected.mask, rtol=2.0**-11, atol=1e-4
    )
