"""Gradients of the PyTorch operator: values, and every way in which PyTorch computes them."""

import types

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dcnv3_tvm as dt
from dcnv3_tvm.compiler import gradients as compiler_gradients
from dcnv3_tvm.compiler import kernel_spec
from dcnv3_tvm.compiler.compile_kernel import GRAD_OFFSET_MASK, GRAD_X
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference_gradient import dcnv3_gradients
from dcnv3_tvm.pytorch.operator import dcnv3, dcnv3_backward
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.tolerances import gradient_bounds
from helpers.distributed import PARAMETERS, ScaledLayer, train_in_group
from helpers.specs import random_inputs

SPEC = DCNv3Spec.of((2, 5, 7, 8), **PARAMETERS)
STRIDED = DCNv3Spec.of(
    (1, 6, 9, 6), group=3, kernel_size=(3, 5), stride=(2, 1), pad=(1, 0), remove_center=True
)
HALF = DCNv3Spec.of((1, 4, 6, 8), group=1, softmax=True, dtype="bfloat16")
DOUBLE = DCNv3Spec.of((1, 3, 2, 4), group=2, dtype="float64", softmax=True)


def inputs(spec, seed=0):
    """Return leaves that require gradients, and a gradient of the result."""
    drawn = random_inputs(spec, seed, spread=1.0)
    grad = np.random.default_rng(seed).standard_normal(spec.output_shape)
    arrays = drawn.x, drawn.offset, drawn.mask, grad
    *leaves, grad = (
        torch.from_numpy(np.asarray(array, "float64")).to(getattr(torch, spec.dtype))
        for array in arrays
    )
    return [leaf.requires_grad_() for leaf in leaves], grad


def gradients(function, leaves, grad):
    output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad.to(output.dtype))


def check(spec, leaves, grad, found):
    arrays = [tensor.detach().double().numpy() for tensor in (grad, *leaves)]
    expected = dcnv3_gradients(*arrays, spec)
    bounds = gradient_bounds(spec, *arrays, expected)
    for leaf, result, reference, bound in zip(leaves, found, expected, bounds, strict=True):
        assert result.dtype == leaf.dtype
        error = np.abs(result.double().numpy() - reference)
        # The gradient of x, too, is rounded to the type of x.
        assert np.all(error <= bound + 2.0**-8 * (leaf.dtype.itemsize == 2) * np.abs(reference))


def call(spec):
    return lambda *leaves: dcnv3(*leaves, **spec.params.keywords())


@pytest.mark.parametrize("spec", [SPEC, STRIDED, HALF], ids=lambda spec: spec.slug)
def test_matches_the_reference(spec):
    leaves, grad = inputs(spec)
    check(spec, leaves, grad, gradients(call(spec), leaves, grad))
    strides = grad.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    with torch.no_grad():
        check(spec, leaves, grad, dcnv3_backward(strides, *leaves, **spec.params.keywords()))


def test_public_function_is_differentiable():
    leaves, grad = inputs(SPEC)
    result = dt.dcnv3(*leaves, **SPEC.params.keywords())
    check(SPEC, leaves, grad, torch.autograd.grad(result, leaves, grad))
    with pytest.raises(InvalidArgumentError, match="out is given for tensors that require"):
        dt.dcnv3(*leaves, out=torch.empty_like(grad), **SPEC.params.keywords())
    with torch.no_grad():
        assert not dt.dcnv3(*leaves, **SPEC.params.keywords()).requires_grad


def test_only_the_gradients_needed_are_computed():
    leaves, grad = inputs(SPEC)
    x, offset, mask = (leaf.detach() for leaf in leaves)
    expected = gradients(call(SPEC), leaves, grad)
    for number in range(3):
        tensors = [x, offset, mask]
        tensors[number] = leaves[number]
        (result,) = torch.autograd.grad(call(SPEC)(*tensors), leaves[number], grad)
        torch.testing.assert_close(result, expected[number], rtol=0, atol=0)


def test_empty_batch():
    x, offset, mask = (
        torch.zeros(0, 5, 7, channels, requires_grad=True) for channels in (8, 36, 18)
    )
    dcnv3(x, offset, mask, group=2).sum().backward()
    assert [leaf.grad.shape for leaf in (x, offset, mask)] == [x.shape, offset.shape, mask.shape]


def test_gradcheck():
    leaves, _ = inputs(DOUBLE)
    assert torch.autograd.gradcheck(call(DOUBLE), leaves)


def test_second_derivatives_raise():
    leaves, grad = inputs(DOUBLE)
    output = call(DOUBLE)(*leaves)
    first = torch.autograd.grad(output, leaves, grad, create_graph=True)
    for gradient in first:
        with pytest.raises(InvalidArgumentError, match="no second derivatives"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("name", ["dcnv3", "dcnv3_grad_x", "dcnv3_grad_offset_mask"])
def test_opcheck(name):
    leaves, grad = inputs(STRIDED)
    if name != "dcnv3":
        leaves = [grad, *(leaf.detach() for leaf in leaves)]
    operator = getattr(torch.ops.dcnv3_tvm, name).default
    results = torch.library.opcheck(operator, leaves, STRIDED.params.keywords())
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_a_training_step_without_graph_breaks():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def step(x, offset, mask, grad):
        return (dcnv3(x @ weight, offset, mask, **SPEC.params.keywords()).relu() * grad).sum()

    leaves, grad = inputs(SPEC)
    wanted = [*leaves, weight]
    expected = torch.autograd.grad(step(*leaves, grad), wanted)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves, grad), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_of_torch_func():
    leaves, grad = inputs(SPEC)
    expected = gradients(call(SPEC), leaves, grad)
    x, offset, mask = (leaf.detach() for leaf in leaves)

    def loss(*tensors):
        return (call(SPEC)(*tensors) * grad).sum()

    for a, b in zip(torch.func.grad(loss, (0, 1, 2))(x, offset, mask), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    images = torch.stack([x, 2 * x, -x], dim=1)
    mapped = torch.vmap(call(SPEC), in_dims=(1, None, None))(images, offset, mask)
    each = torch.func.grad(loss, (0, 1, 2))
    mapped_gradients = torch.vmap(each, in_dims=(1, None, None))(images, offset, mask)
    for number, image in enumerate(images.unbind(1)):
        torch.testing.assert_close(mapped[number], call(SPEC)(image, offset, mask))
        for a, b in zip(mapped_gradients, each(image, offset, mask), strict=True):
            torch.testing.assert_close(a[number], b)


def test_activation_checkpointing():
    leaves, grad = inputs(SPEC)

    def checkpointed(*tensors):
        return checkpoint(call(SPEC), *tensors, use_reentrant=False)

    expected = gradients(call(SPEC), leaves, grad)
    for a, b in zip(gradients(checkpointed, leaves, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autocast_keeps_types():
    """As in a module under autocast: x of a linear layer, offsets of another kept in float32."""
    (x, offset, mask), grad = inputs(SPEC)
    weight = torch.eye(8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = torch.nn.functional.linear(x, weight)
        output = dcnv3(projected, offset, mask, **SPEC.params.keywords())
    assert projected.dtype == output.dtype == torch.bfloat16
    output.backward(grad.bfloat16())
    rounded = [projected.detach().float(), offset.detach(), mask.detach()]
    reference = dcnv3_gradients(
        grad.bfloat16().double().numpy(), *(tensor.double().numpy() for tensor in rounded), SPEC
    )
    assert offset.grad.dtype == mask.grad.dtype == weight.grad.dtype == torch.float32
    for gradient, expected in ((offset.grad, reference.offset), (mask.grad, reference.mask)):
        assert np.abs(gradient.double().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    # The gradient of x is rounded to bfloat16 twice, before and after the linear layer.
    expected = reference.x
    assert np.abs(x.grad.double().numpy() - expected).max() <= 2.0**-7 * np.abs(expected).max()


def test_exports_the_training_graph():
    from torch.export.experimental import _export_forward_backward

    leaves, _ = inputs(SPEC)
    tensors = tuple(leaf.detach() for leaf in leaves)
    joint = _export_forward_backward(torch.export.export(ScaledLayer(), tensors))
    called = [node.target for node in joint.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.dcnv3_tvm.dcnv3.default) == 1
    assert called.count(torch.ops.dcnv3_tvm.dcnv3_grad_x.default) == 1


def test_distributed_data_parallel(tmp_path):
    leaves, _ = inputs(SPEC)
    tensors = tuple(leaf.detach() for leaf in leaves)
    processes = torch.multiprocessing.start_processes(
        train_in_group, (str(tmp_path), tensors), nprocs=2, join=False, start_method="spawn"
    )
    try:
        assert any(processes.join(timeout=60) for _ in range(3)), "a process does not end"
    finally:
        for process in processes.processes:
            process.kill()
    model = ScaledLayer()
    model(*tensors).backward()
    for rank in range(2):  # DDP averages over the processes.
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(2 * found, model.scale.grad)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_gradients_are_rejected(device):
    leaves, grad = inputs(SPEC)
    tensors = [tensor.detach().to(device) for tensor in (grad, *leaves)]
    with pytest.raises(InvalidArgumentError, match="grad does not match x"):
        dcnv3_backward(tensors[0][:, :-1], *tensors[1:], **SPEC.params.keywords())
    with pytest.raises(InvalidArgumentError, match="offset"):
        dcnv3_backward(tensors[0], tensors[1], tensors[3], tensors[3], **SPEC.params.keywords())
    with pytest.raises(InvalidArgumentError, match="dtypes"):
        dcnv3_backward(tensors[0].int(), *tensors[1:], **SPEC.params.keywords())


@pytest.mark.parametrize("argument", range(4))
def test_tensors_on_two_devices_are_rejected(argument):
    leaves, grad = inputs(SPEC)
    tensors = [grad, *(leaf.detach() for leaf in leaves)]
    tensors[argument] = tensors[argument].to("meta")
    with pytest.raises(InvalidArgumentError, match=r"different devices; got .*meta"):
        dcnv3_backward(*tensors, **SPEC.params.keywords())
    if argument:
        with pytest.raises(InvalidArgumentError, match=r"different devices; got .*meta"):
            dcnv3(*tensors[1:], **SPEC.params.keywords())


def test_many_widths_share_a_kernel(monkeypatch):
    """The first widths get kernels of their own; batch and height are always dynamic."""
    compiled = []
    kernel = types.SimpleNamespace(run=lambda *_: None)
    monkeypatch.setattr(
        compiler_gradients, "compile_kernel", lambda *call: compiled.append(call) or kernel
    )
    monkeypatch.setattr(kernel_spec, "MAX_SIZES", 2)
    for width in (3, 4, 5, 6, 3):
        leaves, grad = inputs(DCNv3Spec.of((1, width, width, 33), group=11))
        dcnv3_backward(grad, *(leaf.detach() for leaf in leaves), group=11)
    for kind in (GRAD_X, GRAD_OFFSET_MASK):
        specs = [call[1] for call in compiled if call[0] == kind]
        assert [spec.width for spec in specs] == [3, 4, None, None, 3]
        assert {spec.batch for spec in specs} == {spec.height for spec in specs} == {None}
