"""The published extensions, replaced by stand-ins with their interfaces."""

import sys
import types

import numpy as np
import pytest
import torch

from dcnv3_tvm.bench import extensions
from dcnv3_tvm.bench.extensions import DCNV3, DCNV4
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.pytorch import published_extension
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.pytorch_reference import (
    PyTorchOperator,
    dcnv3_core_pytorch,
    with_sampling,
)
from helpers.specs import random_inputs

SPEC = DCNv3Spec.of((2, 5, 6, 12), group=3, dtype="float64", offset_scale=1.5)


def arguments(spec):
    inputs = random_inputs(spec)
    return tuple(map(torch.from_numpy, (inputs.x, inputs.offset, inputs.mask)))


def forward(x, offset, mask, *parameters):
    """Take the arguments of version 1.1: `im2col_step` is the last but one."""
    *geometry, step, remove_center = parameters
    assert step == 256
    return dcnv3_core_pytorch(x, offset, mask, *geometry, bool(remove_center))


def old_forward(*parameters):
    """Take the arguments of version 1.0, without `remove_center`."""
    if len(parameters) != 15:
        raise TypeError("incompatible function arguments")
    return forward(*parameters, 0)


@pytest.fixture(params=[forward, old_forward])
def dcnv3(request, monkeypatch):
    module = types.ModuleType("DCNv3")
    module.dcnv3_forward = request.param
    monkeypatch.setitem(sys.modules, "DCNv3", module)


class DCNv4Function:
    """Unpack the tensor like DCNv4's kernel, and compute the reference."""

    @staticmethod
    def apply(x, packed, kernel_h, kernel_w, *parameters):
        group, channels, _scale, _step, remove_center = parameters[-5:]
        points = kernel_h * kernel_w - remove_center
        assert packed.shape[-1] % 8 == 0
        assert packed.is_contiguous()
        starts = [g * points * 3 for g in range(group)]
        offset = torch.cat([packed[..., s : s + 2 * points] for s in starts], -1)
        mask = torch.cat([packed[..., s + 2 * points : s + 3 * points] for s in starts], -1)
        spec = DCNv3Spec.of(
            x.shape,
            group=group,
            dtype="float64",
            offset_scale=parameters[-3],
            remove_center=bool(remove_center),
        )
        assert channels == spec.group_channels
        arrays = (tensor.numpy() for tensor in (x, offset, mask))
        return torch.from_numpy(dcnv3_reference(*arrays, spec))


def test_missing_extensions_report_why(monkeypatch):
    for name in ("DCNv3", "DCNv4"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "not importable: ModuleNotFoundError: " in DCNV3.import_failure
    assert "DCNv3" in DCNV3.import_failure
    assert "DCNv4" in DCNV4.import_failure


def test_unrelated_module_is_rejected(monkeypatch):
    monkeypatch.setitem(sys.modules, "DCNv3", types.ModuleType("DCNv3"))
    assert "dcnv3_forward" in DCNV3.import_failure


def test_the_stand_in_is_not_measured_as_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "DCNv3", published_extension)
    assert "the stand-in of dcnv3-tvm" in DCNV3.import_failure


@pytest.mark.usefixtures("dcnv3")
def test_dcnv3():
    assert DCNV3.import_failure is None
    tensors = arguments(SPEC)
    found = DCNV3.prepare(DCNV3.loaded, *tensors, SPEC)()
    reference = dcnv3_reference(*(tensor.numpy() for tensor in tensors), SPEC)
    np.testing.assert_allclose(found.numpy(), reference, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("dcnv3")
def test_dcnv3_does_not_break_torch_compile():
    module = PyTorchOperator(SPEC)
    other = torch.compile(
        with_sampling(module, extensions.extension_sampling), fullgraph=True, backend="eager"
    )
    tensors = arguments(SPEC)
    torch.testing.assert_close(other(*tensors), module(*tensors), rtol=0, atol=1e-12)


@pytest.mark.parametrize("remove_center", [False, True])
def test_dcnv4(remove_center):
    spec = DCNv3Spec.of(
        (2, 5, 6, 12), group=3, dtype="float64", offset_scale=1.5, remove_center=remove_center
    )
    tensors = arguments(spec)
    found = DCNV4.prepare(DCNv4Function, *tensors, spec)()
    reference = dcnv3_reference(*(tensor.numpy() for tensor in tensors), spec)
    np.testing.assert_allclose(found.numpy(), reference, rtol=0, atol=1e-11)


def test_with_sampling_copies_the_module():
    module = PyTorchOperator(SPEC)
    other = with_sampling(module, lambda x, *_: 2 * x)
    tensors = arguments(SPEC)
    torch.testing.assert_close(other(*tensors), 2 * tensors[0])
    torch.testing.assert_close(module(*tensors), PyTorchOperator(SPEC)(*tensors))
