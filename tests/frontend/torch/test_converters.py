"""Each converter compared with PyTorch, with its options, on fixed and on dynamic sizes."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.to_relax import to_relax
from helpers.relax_vm import compile_relax

SHAPE = (2, 4, 6, 9)
OTHER_SHAPE = (2, 4, 7, 5)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def convert_function(function, *, dynamic_size=False):
    model = (function if isinstance(function, nn.Module) else Function(function)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({2: dynamic, 3: dynamic},) if dynamic_size else None
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.zeros(SHAPE),), dynamic_shapes=shapes, strict=False
        )
        return model, to_relax(program)


def check(function, *shapes):
    """Compare with PyTorch on one static shape, or on several shapes with a dynamic size."""
    model, converted = convert_function(function, dynamic_size=len(shapes) > 1)
    main = compile_relax(tvm.IRModule({"main": converted.with_attr("global_symbol", "main")}))
    for shape in shapes:
        x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype("float32"))
        results = main["main"](tvm.runtime.tensor(x.numpy()))
        with torch.no_grad():
            expected = model(x)
        expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        for result, tensor in zip(results, expected, strict=True):
            got = result.numpy()
            assert got.shape == tuple(tensor.shape)
            assert got.dtype == tensor.numpy().dtype
            np.testing.assert_allclose(got, tensor.numpy(), rtol=2e-4, atol=2e-5)


def resize(**options):
    return lambda x: F.interpolate(x, **options)


def attention(**options):
    def function(x):
        tokens = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens * 2, tokens + 1, **options)

    return function


def indexed(x):
    first, second, column = torch.tensor([0, -1]), torch.tensor([-3, 2]), torch.tensor([[1], [0]])
    chosen = (x > 0).long()
    return (
        x[:, :, second],
        x[:, first, second],
        x[first, :, second],
        x[column, :, first],
        x[..., column, second],
        x[first, second, first, second],
        x.index_select(3, chosen[0, 0, :, 0]),
        x.gather(1, chosen),
        F.embedding(chosen[:, 0], torch.arange(6.0).reshape(2, 3)),
    )


def mixed_types(x):
    """TVM's converters compute in the type of the first tensor."""
    n, positions = (x * 5).long(), torch.arange(4)[:, None, None]
    return (
        positions / 4,
        (positions + 0.5) * x,
        n / 3,
        1.5 - n,
        n > 1.5,
        (x > 0) == (x < 1),
        (n > 0) != True,  # noqa: E712
        2 ** n.clamp(0, 9),
        n.clamp(min=-1),
        n.clamp(-1.5, 2),
        torch.div(n, 3, rounding_mode="trunc"),
        torch.div(x, 2, rounding_mode="floor"),
        n.int() % n.abs().clamp(min=1),
        torch.rsub(x, n, alpha=2),
        torch.cat([x, n], 1),
        torch.where(x > 0, n, x),
        x * torch.tensor(0.1, dtype=torch.float64),
        x.double() @ x.double().mT,
        (x > 3).any(),
        n.sin(),
        n.abs().sqrt(),
        n.abs().log1p(),
        2 / (n.abs() + 1),
        (x > 0) * (x < 1),
        (x < -1) + (x > 1),
        (x > 0) * n,
    )


def infinite(x):
    masked = x.masked_fill(x > 0.5, -torch.inf)
    return masked.softmax(-1), torch.full_like(x, -torch.inf), torch.logaddexp(x * 80, x * 60)


def assigned(x):
    result = x.clone()
    result[x > 0] = 0.5
    result[x[:, 0, 0, 0] > 0] = -1
    return result


def odd_scales(x):
    return tuple(
        F.interpolate(x, scale_factor=(1.3, 0.5), mode=mode, antialias=antialias)
        for mode, antialias in (
            ("nearest", False),
            ("nearest-exact", False),
            ("bilinear", False),
            ("bilinear", True),
            ("bicubic", True),
        )
    )


def dynamic_numbers(x):
    """Sizes as operands, and slices of fixed size, which TVM's converters do not support."""
    columns = torch.arange(x.shape[3])
    return (
        columns / x.shape[3],
        columns > x.shape[3] // 2,
        x * x.shape[2],
        x / x.cumsum(2)[:, :, -1:],
        x[..., :4:3] + x[:, :, :1, -2:],
    )


DYNAMIC_SIZE = {
    "numbers that depend on sizes": dynamic_numbers,
    "mixed types": mixed_types,
    "infinite": infinite,
    "assignment by a mask": assigned,
    "cumsum": lambda x: (x.cumsum(2), (x > 0).cumsum(0)),
    "squeeze": lambda x: x[:1, :, :, :1].squeeze(),
    "count_nonzero": lambda x: torch.count_nonzero(x > 0),
    "count_nonzero over axes": lambda x: torch.count_nonzero(F.relu(x), (1, 3)),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3), value=0.5),
    "pad, reflect": lambda x: F.pad(x, (1, 2, 2, 3), mode="reflect"),
    "amax": lambda x: x.amax(1),
    "amax, all axes": lambda x: x.amax(),
    "amin": lambda x: x.amin((2, 3), keepdim=True),
    "max": lambda x: x.max(1),
    "min": lambda x: x.min(-1, keepdim=True),
    "prod": lambda x: x.prod(2),
    "var": lambda x: x.var((1, 2)),
    "var, all axes": lambda x: x.var(),
    "var, biased": lambda x: x.var(-1, unbiased=False, keepdim=True),
    "std": lambda x: x.std((2, 3)),
    "std, all axes": lambda x: x.std(),
    "std, correction": lambda x: x.std(dim=(2,), correction=3, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, (2, 3)),
    "std_mean": lambda x: torch.std_mean(x, 1, keepdim=True, correction=0),
    "nearest by 2": resize(scale_factor=2),
    "nearest by 3 and 2": resize(scale_factor=(3, 2)),
    "nearest to a size": lambda x: F.interpolate(x[..., ::2, ::2], size=x.shape[2:]),
    "nearest-exact by 2": resize(scale_factor=2, mode="nearest-exact"),
    "bilinear by 2": resize(scale_factor=2, mode="bilinear"),
    "bilinear to 13": resize(size=(13, 17), mode="bilinear"),
    "bicubic by 2": resize(scale_factor=2, mode="bicubic"),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, :, 0], x[0, 0, 0], indexing="ij"),
    "meshgrid, xy": lambda x: torch.meshgrid(
        x[0, 0, :, 0], x[0, 0, 0], x[0, :, 0, 0], indexing="xy"
    ),
    "roll": lambda x: torch.roll(x, (1, -2), (2, 3)),
    "roll, flattened": lambda x: torch.roll(x, 5),
    "roll, more than the size": lambda x: torch.roll(x, -20, 2),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "attention": attention(),
    "attention, causal": attention(is_causal=True),
    "negative index": lambda x: x[:, -1, -2],
    "index tensors": indexed,
    "grid_sample": lambda x: F.grid_sample(
        x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)) * 1.3, align_corners=False
    ),
}


@pytest.mark.parametrize("name", DYNAMIC_SIZE)
def test_dynamic_size(name):
    check(DYNAMIC_SIZE[name], SHAPE, OTHER_SHAPE)


FIXED_SIZE = {
    "std of one element": lambda x: x[:, :1].std(1),
    "adaptive_max_pool2d to 1": nn.AdaptiveMaxPool2d(1),
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d((2, 3)),
    "nearest to 13": resize(size=(13, 17)),
    "nearest to 4": resize(size=(4, 5)),
    "nearest-exact to 4": resize(size=(4, 5), mode="nearest-exact"),
    "nearest by 0.5": lambda x: F.interpolate(x[..., :8], scale_factor=0.5),
    "bilinear to 4": resize(size=(4, 5), mode="bilinear"),
    "bilinear, align_corners": resize(size=(13, 17), mode="bilinear", align_corners=True),
    "align_corners to one row": resize(size=(1, 17), mode="bilinear", align_corners=True),
    "align_corners to one pixel": resize(size=(1, 1), mode="bicubic", align_corners=True),
    "bicubic, align_corners": resize(size=(13, 17), mode="bicubic", align_corners=True),
    "bilinear, antialias": resize(size=(13, 17), mode="bilinear", antialias=True),
    "scales that give no whole numbers": odd_scales,
    "pooling without a stride": lambda x: (
        F.max_pool2d(x, 2, ceil_mode=True),
        F.max_pool2d(x[0], (2, 3), padding=1),
        F.avg_pool2d(x, 2, ceil_mode=True),
    ),
    "unfold, strided and dilated": lambda x: F.unfold(
        x, (2, 3), dilation=2, stride=2, padding=(1, 2)
    ),
    "Tensor.unfold": lambda x: (x.unfold(3, 3, 2), x.unfold(1, 2, 1)),
    "linspace": lambda x: x * torch.linspace(-1, 1, x.shape[3]),
    "attention, scale": attention(scale=0.3),
    "attention, 4-D": lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1),
    "attention, boolean mask": attention(attn_mask=torch.eye(54).bool()),
    "attention, additive mask": attention(attn_mask=torch.linspace(-3, 3, 54)),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "clamp_max": lambda x: torch.clamp_max(x, 0.3),
    "elu": nn.ELU(0.7),
    "celu": nn.CELU(0.6),
    "add, alpha": lambda x: torch.add(x, x * 2, alpha=0.5),
    "sub, alpha": lambda x: torch.sub(x, 3, alpha=0.5),
    "add": lambda x: x + 2 + x,
    "avg_pool2d": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "group_norm": nn.GroupNorm(2, 4, eps=0.1, affine=False),
    "instance_norm": nn.InstanceNorm2d(4, eps=0.1),
    "grid_sample, align_corners": lambda x: F.grid_sample(
        x,
        torch.tanh(x[:, :2].permute(0, 2, 3, 1)) * 1.3,
        mode="nearest",
        padding_mode="border",
        align_corners=True,
    ),
}


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_fixed_size(name):
    check(FIXED_SIZE[name], SHAPE)


def test_index_outside_gives_nan():
    """PyTorch raises an error."""

    def select(x):
        index, table = x[0, 0, 0].long(), torch.arange(9.0).reshape(3, 3)
        together = table[torch.zeros_like(index), index]
        return F.embedding(index, table), table[index], together, table.gather(0, index[:, None])

    _, converted = convert_function(select)
    main = compile_relax(tvm.IRModule({"main": converted.with_attr("global_symbol", "main")}))
    x = np.zeros(SHAPE, np.float32)
    x[0, 0, 0, :5] = [-4, -1, 2, 3, 1e9]
    embedded, indexed, together, gathered = (
        np.isnan(result.numpy()) for result in main["main"](tvm.runtime.tensor(x))
    )
    outside = [True, False, False, True, True, False, False, False, False]
    assert together.tolist() == outside
    assert indexed.all(1).tolist() == indexed.any(1).tolist() == outside
    outside[1] = True  # Negative.
    assert embedded.all(1).tolist() == gathered[:, 0].tolist() == outside


UNSUPPORTED = {
    "windows of different sizes": (nn.AdaptiveMaxPool2d(5), False),
    "return_indices=True": (nn.AdaptiveMaxPool2d(1, return_indices=True), False),
    "whole number of pixels": (resize(scale_factor=1.5), True),
    "from a dynamic to a fixed size": (resize(size=(13, 17)), True),
    "align_corners=True to a dynamic size": (
        resize(scale_factor=2, mode="bilinear", align_corners=True),
        True,
    ),
    "antialias=True": (resize(scale_factor=0.5, mode="bilinear", antialias=True), True),
    "statistics of the batch": (nn.BatchNorm2d(4, track_running_stats=False), False),
    "divisor_override": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), False),
    "grouped-query attention": (attention(enable_gqa=True), False),
    "running statistics": (nn.InstanceNorm2d(4, track_running_stats=True), False),
    "depends on a dynamic size": (lambda x: F.pad(x, (0, -x.shape[3] % 32)), True),
    "selection by a mask": (lambda x: x[torch.tensor([True, False])], False),
    "aten.topk": (lambda x: x.topk(2), False),
    "aten.sort": (lambda x: x.sort(), False),
    "circular padding by a negative": (
        lambda x: F.pad(x, (-1, 1, 0, 0), mode="circular"),
        False,
    ),
    "several values to what a mask selects": (
        lambda x: x[:1].index_put((x[:1] > 0,), torch.arange(3.0)),
        False,
    ),
    "while PyTorch returns": (lambda x: F.max_pool2d(x, 2, return_indices=True), False),
    "TVM cannot convert an operator": (
        lambda x: torch.cat([x, torch.zeros(0)], 1),
        False,
    ),
}


@pytest.mark.parametrize("problem", UNSUPPORTED)
def test_unsupported_operator_names_its_source_line(problem):
    function, dynamic_size = UNSUPPORTED[problem]
    with pytest.raises(ModelImportError, match=f"(?s){re.escape(problem)}.*in forward"):
        convert_function(function, dynamic_size=dynamic_size)
