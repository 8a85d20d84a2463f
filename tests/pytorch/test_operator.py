import contextlib

import numpy as np
import pytest
import torch

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.pytorch.operator import dcnv3
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.tolerances import operator_bound
from helpers.specs import random_inputs

SPEC = DCNv3Spec.of((2, 5, 7, 8), group=2, offset_scale=1.5)
STRIDED = DCNv3Spec.of(
    (1, 6, 9, 6), group=3, kernel_size=(3, 5), stride=(2, 1), pad=(1, 0), remove_center=True
)
HALF = DCNv3Spec.of((1, 4, 6, 8), group=1, softmax=True, dtype="bfloat16")


def inputs(spec, seed=0):
    drawn = random_inputs(spec, seed)
    arrays = drawn.x, drawn.offset, drawn.mask
    dtype = getattr(torch, spec.dtype)
    return [torch.from_numpy(np.asarray(array, "float64")).to(dtype) for array in arrays]


def check(spec, tensors, output):
    arrays = [tensor.detach().double().numpy() for tensor in tensors]
    expected = dcnv3_reference(*arrays, spec)
    error = np.abs(output.detach().double().numpy() - expected)
    assert np.all(error <= operator_bound(spec, *arrays, expected))


@pytest.mark.parametrize("spec", [SPEC, STRIDED, HALF], ids=lambda spec: spec.slug)
def test_matches_the_reference(spec):
    tensors = inputs(spec)
    output = dcnv3(*tensors, **spec.keywords())
    assert output.shape == spec.output_shape
    assert output.dtype == tensors[0].dtype
    assert output.is_contiguous()
    check(spec, tensors, output)


def test_noncontiguous_inputs():
    x, offset, mask = inputs(SPEC)
    nchw = x.permute(0, 3, 1, 2).contiguous()
    output = dcnv3(nchw.permute(0, 2, 3, 1), offset, mask, **SPEC.keywords())
    torch.testing.assert_close(output, dcnv3(x, offset, mask, **SPEC.keywords()))


def test_inputs_are_not_modified():
    tensors = inputs(SPEC)
    before = [tensor.clone() for tensor in tensors]
    dcnv3(*tensors, **SPEC.keywords())
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


def test_compiles_without_graph_breaks():
    def layer(x, offset, logits):
        mask = torch.softmax(logits.unflatten(-1, (SPEC.group, -1)), -1).flatten(-2)
        return dcnv3(x * 2, offset, mask, **SPEC.keywords()).relu()

    tensors = inputs(SPEC)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), layer(*tensors))


class Layer(torch.nn.Module):
    def forward(self, x, offset, mask):
        return dcnv3(x, offset, mask, group=SPEC.group, stride=2)


def test_exports_with_dynamic_sizes():
    strided = DCNv3Spec.of((2, 5, 7, 8), group=2, stride=2)
    n, h, w = (torch.export.Dim.DYNAMIC for _ in "nhw")
    sampled = {0: n, 1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(
        Layer(), tuple(inputs(strided)), dynamic_shapes=({0: n, 1: h, 2: w}, sampled, sampled)
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.dcnv3_tvm.dcnv3.default) == 1
    other = DCNv3Spec.of((3, 9, 6, 8), group=2, stride=2)
    tensors = inputs(other)
    check(other, tensors, program.module()(*tensors))


def test_fake_implementation_returns_the_shape():
    tensors = [tensor.to("meta") for tensor in inputs(STRIDED)]
    output = dcnv3(*tensors, **STRIDED.keywords())
    assert output.is_meta
    assert output.shape == STRIDED.output_shape


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 8, 5, 7)}, "NHWC is expected"),
        ({"x": (5, 7, 8)}, "four dimensions"),
        ({"offset": (2, 5, 7, 18)}, "offset"),
        ({"mask": (2, 5, 6, 18)}, "mask"),
        ({"mask": (2, 5, 7)}, "mask"),
        ({"group": 3}, "cannot be divided into 3 groups"),
        ({"kernel_size": 2, "remove_center": True}, "remove_center needs an odd kernel"),
    ],
)
def test_invalid_arguments_are_rejected(device, change, message):
    shapes = {"x": (2, 5, 7, 8), "offset": (2, 5, 7, 36), "mask": (2, 5, 7, 18)}
    tensors = [torch.zeros(change.get(n, shape), device=device) for n, shape in shapes.items()]
    arguments = {"group": 2} | {n: value for n, value in change.items() if n not in shapes}
    with pytest.raises(InvalidArgumentError, match=message):
        dcnv3(*tensors, **arguments)


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_is_registered_for_device(key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("dcnv3_tvm::dcnv3", key)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        (("bfloat16", "bfloat16", "float32"), 2e-2),
        (("float32", "bfloat16", "bfloat16"), 1e-6),
        (("float16", "float32", "float32"), 1e-3),
    ],
)
def test_mixed_dtypes(dtypes, tolerance):
    tensors = [
        tensor.to(getattr(torch, dtype)) for tensor, dtype in zip(inputs(SPEC), dtypes, strict=True)
    ]
    expected = dcnv3(*(tensor.double() for tensor in tensors), **SPEC.params.keywords())
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            output = dcnv3(*tensors, **SPEC.params.keywords())
        assert output.dtype == tensors[0].dtype
        assert (output.double() - expected).abs().max() <= tolerance * expected.abs().max()
    fake = dcnv3(*(tensor.to("meta") for tensor in tensors), **SPEC.params.keywords())
    assert fake.dtype == tensors[0].dtype


def test_integers_are_rejected():
    x, offset, mask = inputs(SPEC)
    for device in ("cpu", "meta"):
        with pytest.raises(InvalidArgumentError, match="dtype"):
            dcnv3(x.int().to(device), offset.int().to(device), mask.int().to(device), group=2)
        with pytest.raises(InvalidArgumentError, match="dtype"):
            dcnv3(x.int().to(device), offset.to(device), mask.to(device), group=2)
