"""Conversion of tensors to kernel arguments and back."""

import ml_dtypes
import numpy as np
import pytest
import torch
import tvm
from torch._subclasses.fake_tensor import FakeTensorMode

from dcnv3_tvm.dtypes import DTYPE_BYTES, numpy_dtype
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import tensors


def numbers(dtype="float32"):
    array = tensors.aligned_bytes(24 * numpy_dtype(dtype).itemsize).view(numpy_dtype(dtype))
    array[:] = np.arange(24)
    return array.reshape(2, 3, 4)


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


KINDS = {"numpy": lambda array: array, "torch": to_torch, "tvm": tvm.runtime.tensor}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@kinds
def test_round_trip_shares_memory(kind, dtype):
    tensor = KINDS[kind](numbers(dtype))
    assert tensors.kind_of("x", tensor) == kind
    assert tensors.device_of(tensor) == "cpu"
    assert (tensors.shape_of(tensor), tensors.dtype_of(tensor)) == ((2, 3, 4), dtype)
    argument = tensors.to_kernel(tensor, tensors.ALIGNMENT)
    again = tensors.from_kernel(argument, kind)
    assert tensors.to_kernel(again).data_ptr() == argument.data_ptr()
    values = tensors.to_numpy(tensors.to_kernel(again))
    np.testing.assert_array_equal(values, numbers(dtype))


@kinds
def test_misaligned_tensors_are_copied(kind):
    buffer = tensors.aligned_bytes(100)[4:].view(np.float32)
    buffer[:] = np.arange(24)
    tensor = buffer if kind == "numpy" else tensors.from_kernel(tensors.to_kernel(buffer), kind)
    assert tensors.to_kernel(tensor).data_ptr() == buffer.ctypes.data
    copy = tensors.to_kernel(tensor, tensors.ALIGNMENT)
    assert copy.data_ptr() % tensors.ALIGNMENT == 0
    np.testing.assert_array_equal(np.from_dlpack(copy), np.arange(24))


@pytest.mark.parametrize("make", [lambda a: a, to_torch], ids=["numpy", "torch"])
def test_strided_tensors_are_copied(make):
    strided = make(numbers())[:, ::2]
    np.testing.assert_array_equal(np.from_dlpack(tensors.to_kernel(strided)), numbers()[:, ::2])


def test_negated_view_is_resolved():
    values = torch.complex(torch.zeros(4), torch.arange(4.0)).conj().imag.expand(2, 4)
    for view in (values, torch._neg_view(to_torch(numbers()))):
        assert view.is_neg()
        np.testing.assert_array_equal(np.from_dlpack(tensors.to_kernel(view)), view.clone().numpy())


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@kinds
def test_empty_like(kind, dtype):
    result = tensors.empty_like(KINDS[kind](numbers(dtype)), (5, 1))
    assert tensors.kind_of("out", result) == kind
    assert (tensors.shape_of(result), tensors.dtype_of(result)) == ((5, 1), dtype)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "x is not a tensor; got builtins.list; .* Pass an array"),
        (torch.empty(2, device="meta"), "x is not a dense tensor in CPU memory.*device meta"),
        (torch.eye(2).to_sparse(), "got Tensor, device cpu, layout torch.sparse_coo"),
        (FakeTensorMode().from_tensor(torch.ones(2)), "x is not a dense tensor.*got FakeTensor"),
        (np.ma.zeros(2), r"x is a masked array.*Use x\.filled"),
    ],
    ids=["list", "meta", "sparse", "fake", "masked"],
)
def test_other_values_are_rejected(value, message):
    with pytest.raises(InvalidArgumentError, match=message):
        tensors.kind_of("x", value, hint="Pass an array.")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensor_is_rejected():
    with pytest.raises(InvalidArgumentError, match="x is not a dense tensor"):
        tensors.kind_of("x", torch.nested.nested_tensor([torch.ones(2)]))
