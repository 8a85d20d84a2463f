"""`dcnv3` and `compile_op` with valid and invalid tensors of every kind."""

import functools
import gc
import pickle
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
import tvm

from dcnv3_tvm import gpu
from dcnv3_tvm.compiler.functional import dcnv3
from dcnv3_tvm.compiler.operator import compile_op
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError, TargetError
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.tolerances import operator_bound
from helpers.specs import random_inputs

SHAPE, GROUP = (2, 7, 5, 6), 2
DTYPES = pytest.mark.parametrize("dtype", DTYPE_BYTES)


def problem(dtype="float32", **parameters):
    spec = DCNv3Spec.of(SHAPE, group=GROUP, dtype=dtype, **parameters)
    inputs = random_inputs(spec, seed=1)
    return spec, (inputs.x, inputs.offset, inputs.mask)


def assert_matches_reference(result, spec, arrays):
    reference = dcnv3_reference(*arrays, spec)
    error = np.abs(np.asarray(result).astype(np.float64) - reference)
    assert np.all(error <= operator_bound(spec, *arrays, reference))


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def from_torch(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@DTYPES
def test_numpy(dtype):
    spec, arrays = problem(dtype)
    result = dcnv3(*arrays, group=GROUP)
    assert isinstance(result, np.ndarray)
    assert result.dtype == arrays[0].dtype
    assert_matches_reference(result, spec, arrays)


@DTYPES
def test_torch(dtype):
    spec, arrays = problem(dtype)
    result = dcnv3(*map(to_torch, arrays), group=GROUP)
    assert isinstance(result, torch.Tensor)
    assert result.dtype == getattr(torch, dtype)
    assert result.is_contiguous()
    assert_matches_reference(from_torch(result), spec, arrays)


@DTYPES
def test_tvm(dtype):
    spec, arrays = problem(dtype)
    result = dcnv3(*map(tvm.runtime.tensor, arrays), group=GROUP)
    assert isinstance(result, tvm.runtime.Tensor)
    assert_matches_reference(result.numpy(), spec, arrays)


def test_every_parameter():
    parameters = {
        "kernel_size": (3, 5),
        "stride": (2, 1),
        "pad": (1, 2),
        "dilation": (1, 2),
        "offset_scale": 0.75,
        "remove_center": True,
        "softmax": True,
    }
    spec, arrays = problem(**parameters)
    assert_matches_reference(dcnv3(*arrays, group=GROUP, **parameters), spec, arrays)


def unaligned(array):
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = array.itemsize + -buffer.ctypes.data % 64
    view = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "change",
    [
        unaligned,
        read_only,
        np.asfortranarray,
        lambda array: np.repeat(array, 2, axis=1)[:, ::2],
        lambda array: array.astype(array.dtype.newbyteorder(">")),
        lambda array: torch.from_numpy(array.transpose(0, 3, 1, 2).copy()).permute(0, 2, 3, 1),
        lambda array: torch.from_numpy(array.copy()).requires_grad_(),
        lambda array: torch.complex(torch.zeros(array.shape), torch.from_numpy(-array)).conj().imag,
    ],
    ids=[
        *("unaligned", "read-only", "fortran", "strided", "big-endian", "permuted", "with-grad"),
        "negated",
    ],
)
def test_inputs_that_need_a_copy(change):
    spec, arrays = problem()
    for usual in (arrays, map(to_torch, arrays)):  # A repeated call does not overlook it.
        dcnv3(*usual, group=GROUP)
    result = dcnv3(*(change(array) for array in arrays), group=GROUP)
    assert_matches_reference(result, spec, arrays)


def test_inputs_are_not_kept_alive():
    _, arrays = problem()
    x = torch.from_numpy(arrays[0].copy())
    alive = weakref.ref(x)
    dcnv3(x, *map(torch.from_numpy, arrays[1:]), group=GROUP)
    del x
    gc.collect()
    assert alive() is None


def test_empty_batch():
    _, arrays = problem()
    empty = [array[:0] for array in arrays]
    for operator in (
        functools.partial(dcnv3, group=GROUP),
        compile_op(DCNv3Spec.of((None, *SHAPE[1:]), group=GROUP)),
        compile_op(DCNv3Spec.of((0, *SHAPE[1:]), group=GROUP)),
    ):
        result = operator(*map(torch.from_numpy, empty))
        assert (result.shape, result.dtype) == ((0, *SHAPE[1:]), torch.float32)
    with pytest.raises(InvalidArgumentError, match="offset has the wrong shape"):
        dcnv3(empty[0], *arrays[1:], group=GROUP)


def test_parameters_as_arrays_and_numpy_numbers():
    _, arrays = problem()
    expected = dcnv3(*arrays, group=GROUP)
    given = {name: np.array([each] * 2) for name, each in {"kernel_size": 3, "pad": 1}.items()}
    given |= {"stride": [np.int64(1), np.uint8(1)], "group": np.int16(GROUP)}
    given |= {"offset_scale": np.float32(1), "softmax": np.bool_(False), "dilation": np.array(1)}
    np.testing.assert_array_equal(dcnv3(*arrays, **given), expected)


NHWC = r"NHWC is expected: an NCHW tensor needs {}\.permute\(0, 2, 3, 1\)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, o, m: (x[:, :0], o, m), r"x is empty; got shape \(2, 0, 5, 6\)"),
        (lambda x, o, m: (x[0], o, m), r"x does not have four dimensions; got shape \(7, 5, 6\)"),
        (lambda x, o, m: (x, o[0], m), r"offset does not have four .* \(7, 5, 36\)"),
        (
            lambda x, o, m: (x, o[..., :-1], m),
            r"offset has the wrong shape; got shape \(2, 7, 5, 35\); allowed: shape \(2, 7, 5, 36",
        ),
        (lambda x, o, m: (x, o, m[:, 1:]), r"mask has the wrong shape; got shape \(2, 6, 5, 18\)"),
        (lambda x, o, m: (x, o, m[:1]), r"mask has the wrong shape; got shape \(1, 7, 5, 18\)"),
        (lambda x, o, m: (x, o.astype("f8"), m), "offset has another dtype .*; got float64"),
        (lambda x, o, m: (x.astype(int), o, m), "x has a dtype that is not .*; got int64"),
        (lambda x, o, m: (x, torch.from_numpy(o), m), "different kinds; got x: numpy, offset: to"),
        (lambda x, o, m: (x.tolist(), o, m), "x is not a tensor; got builtins.list"),
        (lambda x, o, m: tuple(torch.empty(a.shape, device="meta") for a in (x, o, m)), "cpu"),
        (lambda x, o, m: (x, o.transpose(0, 3, 1, 2), m), NHWC.format("offset")),
        (lambda x, o, m: (x.transpose(0, 3, 1, 2), o, m), NHWC.format("x")),
    ],
)
def test_invalid_tensors_are_rejected(change, message):
    _, arrays = problem()
    dcnv3(*arrays, group=GROUP)  # Not only in a first call.
    with pytest.raises(InvalidArgumentError, match=message):
        dcnv3(*change(*arrays), group=GROUP)


@pytest.mark.parametrize(
    ("valid", "invalid"),
    [
        ({"group": 2}, {"group": 2.0}),
        ({"group": 1}, {"group": True}),
        ({"group": 2, "kernel_size": (3, 3)}, {"group": 2, "kernel_size": (3.0, 3)}),
        ({"group": 2, "pad": [1, 1]}, {"group": 2, "pad": [1, True]}),
        ({"group": 2, "softmax": False}, {"group": 2, "softmax": 0.0}),
    ],
)
def test_invalid_parameters_equal_to_valid_ones_are_rejected(valid, invalid):
    spec = DCNv3Spec.of(SHAPE, **valid)
    inputs = random_inputs(spec)
    tensors = [torch.from_numpy(each) for each in (inputs.x, inputs.offset, inputs.mask)]
    dcnv3(*tensors, **valid)
    with pytest.raises(InvalidArgumentError, match=f"{list(invalid)[-1]} is "):
        dcnv3(*tensors, **invalid)


KINDS = pytest.mark.parametrize(
    "convert", [np.copy, to_torch, tvm.runtime.tensor], ids=["numpy", "torch", "tvm"]
)


@KINDS
def test_out(convert):
    spec, arrays = problem()
    inputs = [convert(array) for array in arrays]
    operator = compile_op(DCNv3Spec.of((None, *SHAPE[1:]), group=GROUP))
    for function in (functools.partial(dcnv3, group=GROUP), operator):
        for _ in range(2):  # Repeated calls have fewer checks.
            out = convert(np.full(spec.output_shape, np.nan, np.float32))
            assert function(*inputs, out=out) is out
            assert_matches_reference(out if convert is np.copy else out.numpy(), spec, arrays)
    empty = convert(arrays[0][:0])
    assert operator(*(convert(array[:0]) for array in arrays), out=empty) is empty


@pytest.mark.parametrize(
    ("make_out", "message"),
    [
        (lambda x: x.numpy(), "out is of another kind than x; got numpy; allowed: torch"),
        (lambda x: x.double(), "out has another dtype than x; got float64; allowed: float32"),
        (lambda x: x[:1].clone(), r"out has the wrong shape; got \(1, 7, 5, 6\)"),
        (lambda x: x.clone().mT, r"out has the wrong shape; got \(2, 7, 6, 5\)"),
        (lambda x: x.repeat(1, 1, 1, 2)[..., ::2], "out cannot be written; .* contiguous"),
        (lambda x: x.clone().requires_grad_(), "out cannot be written; .* requires no gradient"),
        (lambda x: x, "out shares memory with x, offset or mask"),
        (lambda x: [x], "out is not a tensor"),
    ],
)
def test_invalid_out_is_rejected(make_out, message):
    _, arrays = problem()
    inputs = [to_torch(array) for array in arrays]
    expected = dcnv3(*inputs, group=GROUP)
    with pytest.raises(InvalidArgumentError, match=message):
        dcnv3(*inputs, group=GROUP, out=make_out(inputs[0]))
    assert dcnv3(*inputs, group=GROUP).equal(expected)


def test_read_only_out_is_rejected():
    _, arrays = problem()
    with pytest.raises(InvalidArgumentError, match="out cannot be written"):
        dcnv3(*arrays, group=GROUP, out=read_only(arrays[0]))


def test_nchw_with_divisible_channels_gets_a_hint():
    """As NHWC, (2, 8, 5, 4) has 4 channels, a multiple of 4 groups: only offset does not match."""
    spec = DCNv3Spec.of((2, 5, 4, 8), group=4)
    inputs = random_inputs(spec)
    with pytest.raises(InvalidArgumentError, match=NHWC.format("x")):
        dcnv3(inputs.x.transpose(0, 3, 1, 2), inputs.offset, inputs.mask, group=4)


@pytest.mark.skipif(bool(gpu.devices()), reason="needs a machine without a GPU")
def test_missing_gpu_error_suggests_an_architecture():
    with pytest.raises(TargetError, match=r"has no NVIDIA GPU.*cuda-sm90"):
        compile_op(problem()[0], "cuda")


def test_compile_op_needs_a_specification():
    for wrong in ("a", None, (1, 8, 8, 4)):
        with pytest.raises(InvalidArgumentError, match="not a DCNv3Spec"):
            compile_op(wrong)


def test_compile_op_is_cached():
    spec, arrays = problem()
    operator = compile_op(spec)
    assert compile_op(DCNv3Spec.of(SHAPE, group=GROUP)) is operator
    assert operator.kernel.rule == "dcnv3"
    assert compile_op(spec, "cpu-x86-64") is compile_op(spec, "llvm -mcpu=x86-64")
    assert_matches_reference(operator(*arrays), spec, arrays)
    copied = pickle.loads(pickle.dumps(operator))
    assert_matches_reference(copied(*arrays), spec, arrays)


def test_compile_op_with_dynamic_sizes():
    operator = compile_op(DCNv3Spec.of((None, None, None, 6), group=GROUP))
    for shape in ((2, 7, 5, 6), (1, 1, 9, 6)):
        spec = DCNv3Spec.of(shape, group=GROUP)
        inputs = random_inputs(spec)
        arrays = (inputs.x, inputs.offset, inputs.mask)
        assert_matches_reference(operator(*arrays), spec, arrays)
    with pytest.raises(InvalidArgumentError, match="x has the wrong shape"):
        operator(arrays[0][..., :4], *arrays[1:])
    with pytest.raises(InvalidArgumentError, match="mask has the wrong shape"):
        operator(*arrays[:2], arrays[2][:, :, 1:])


@pytest.mark.parametrize("name", ["llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76"])
def test_operator_for_another_machine_raises(name):
    spec, arrays = problem()
    operator = compile_op(spec, name)
    with pytest.raises(TargetError, match="another machine; got linux-aarch64-cortex-a76"):
        operator(*arrays)
