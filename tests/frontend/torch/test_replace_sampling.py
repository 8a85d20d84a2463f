"""Functions with a published name are replaced only in calls for which they compute DCNv3."""

import re
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.importer import import_model
from dcnv3_tvm.frontend.torch.replace_sampling import SamplingReplacement
from dcnv3_tvm.verify.pytorch_reference import dcnv3_core_pytorch
from helpers import published_style_models as published
from helpers.imported_models import (
    assert_close,
    count_dcnv3,
    random_image,
    run_imported,
    run_pytorch,
)

SHAPE = (1, 3, 18, 26)
TENSORS = [torch.randn(1, 5, 6, channels) for channels in (8, 36, 18)]
ARGUMENTS = (3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.0, False)


def other(change):
    """Make a function with the published name that changes the tensors."""

    def dcnv3_core_pytorch(x, offset, mask, *rest):
        return published.dcnv3_core_pytorch(*change(x, offset, mask), *rest)

    return dcnv3_core_pytorch


def with_grid_sample(**options):
    """Copy the published function with another call of grid_sample."""
    own = types.SimpleNamespace(
        grid_sample=lambda image, grid, **given: F.grid_sample(image, grid, **{**given, **options})
    )
    names = {**dcnv3_core_pytorch.__globals__, "F": own}
    return types.FunctionType(dcnv3_core_pytorch.__code__, names, dcnv3_core_pytorch.__name__)


def write_to_offset(x, offset, mask):
    return x, offset.clamp_(-1, 1).mul_(1), mask


def add_earlier(x, offset, mask, earlier=[]):  # noqa: B006
    earlier.append(offset)
    return x, offset + len(earlier) - 1, mask


CHANGED = {
    "tanh": other(lambda x, offset, mask: (x, 2 * offset.tanh(), mask)),
    "far clamp": other(lambda x, offset, mask: (x, offset.clamp(-5, 5), mask)),
    "mask weight": other(lambda x, offset, mask: (x, offset, mask * 0.99)),
    "normalised mask": other(lambda x, o, mask: (x, o, mask / mask.sum(-1, keepdim=True))),
    "one size": other(lambda x, o, mask: (x, o * (2 if x.shape[1:3] == (5, 6) else 1), mask)),
    "NaN": other(lambda x, offset, mask: (x * float("nan"), offset, mask)),
    "random": other(lambda x, offset, mask: (x, offset + torch.rand_like(offset), mask)),
    "writes": other(write_to_offset),
    "state": other(add_earlier),
    "align_corners": with_grid_sample(align_corners=True),
    "nearest": with_grid_sample(mode="nearest"),
    "border": with_grid_sample(padding_mode="border"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_changed_function_is_called_as_it_is(change):
    # Only this function: a changed one may call the published one.
    core = CHANGED[change]
    with SamplingReplacement() as sampling:
        core(*TENSORS, *ARGUMENTS)
    check = next(each for each in sampling.checks if each.source.startswith(core.__module__))
    assert not check.replaced
    assert check.error > 1e-3
    assert "imported as it is, does not compute DCNv3 (relative error" in str(check)


def float32_only(x, offset, mask, *rest):
    assert x.dtype == torch.float32
    return published.dcnv3_core_pytorch(x, offset, mask, *rest)


@pytest.mark.parametrize("core", [with_grid_sample(), other(lambda *t: t), float32_only])
def test_same_function_is_replaced(core, monkeypatch):
    monkeypatch.setattr(core, "__name__", "dcnv3_core_pytorch")
    expected = core(*TENSORS, *ARGUMENTS)
    code = core.__code__
    with SamplingReplacement() as sampling:
        assert core.__code__ is not code
        thread = threading.Thread(target=core, args=(*TENSORS, *ARGUMENTS))
        thread.start()
        thread.join()
        assert not sampling.checks, "replaced in another thread"
        got = core(*TENSORS, *ARGUMENTS)
    assert core.__code__ is code
    torch.testing.assert_close(got, expected)
    (check,) = sampling.checks
    assert check.replaced
    assert check.error < 1e-5


def autograd_function(change, decorate):
    """Make a function like the published one: Python code around the CUDA extension."""

    class DCNv3Function(torch.autograd.Function):
        @staticmethod
        @decorate
        def forward(context, x, offset, mask, *arguments):
            context.save_for_backward(x, offset, mask)
            return DCNv3.dcnv3_forward(x, change(offset), mask, *arguments)  # noqa: F821

    return DCNv3Function


@pytest.mark.parametrize(
    ("function", "change", "outcome"),
    [
        (
            autograd_function(torch.clone, torch.amp.custom_fwd(device_type="cuda")),
            torch.clone,
            "replaced by the operator, computes DCNv3",
        ),
        (
            autograd_function(torch.tanh, lambda forward: forward),
            torch.tanh,
            "imported as it is, does not compute DCNv3",
        ),
        (
            published.DCNv3Function,
            torch.clone,
            "replaced by the operator, not verified: .*not implemented on the CPU",
        ),
    ],
)
def test_python_code_around_the_extension(function, change, outcome):
    x, offset, mask = TENSORS
    with SamplingReplacement() as sampling, torch.no_grad():
        got = function.apply(x, offset, mask, *ARGUMENTS[:-1], 256, ARGUMENTS[-1])
    torch.testing.assert_close(got, dcnv3_core_pytorch(x, change(offset), mask, *ARGUMENTS))
    (check,) = sampling.checks
    assert re.search(outcome, str(check))


def test_other_arguments_are_not_replaced():
    def dcnv3_core_pytorch(x, offset, mask, group):
        return published.dcnv3_core_pytorch(x, offset, mask, *ARGUMENTS[:8], group, 4, 1.0)

    with SamplingReplacement() as sampling:
        dcnv3_core_pytorch(*TENSORS, 2)
    own, inner = sampling.checks
    assert "not verified: its arguments are not the published ones" in str(own)
    assert inner.replaced


class ChannelsFirst(published.DCNv3Pytorch):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(ChannelsFirst):
    def forward(self, x):
        return F.relu(super(Residual, self).forward(F.layer_norm(x, x.shape[1:])) + x)  # noqa: UP008


class Explicit(published.DCNv3LateImport):
    scale = 0.5

    def forward(self, x):
        return published.DCNv3LateImport.forward(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Method(ChannelsFirst):
    """Samples by a method that is called with keywords and depends on an attribute."""

    scale = 0.5

    def forward(self, x):
        projected, offset, mask, local = self.sampling_inputs(x.permute(0, 2, 3, 1))
        y = self.core(input=projected, offset=offset, mask=mask)
        return self.project_output(y, projected, local).permute(0, 3, 1, 2)

    def core(self, **tensors):
        return self.dcnv3_core_pytorch(*tensors.values(), *self.sampling_arguments())

    def dcnv3_core_pytorch(self, input, offset, mask, *rest):  # noqa: A002
        return dcnv3_core_pytorch(input, offset * self.scale, mask, *rest)


class Unscaled(Method):
    scale = 1.0


def test_wrapped_and_changed_modules():
    parts = (ChannelsFirst(), Residual(), Explicit(), Method(), Unscaled())
    model = published.randomised(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *parts))
    with pytest.warns(
        UserWarning, match=r"Method\.dcnv3_core_pytorch: imported as it is, does not"
    ):
        imported = import_model(model, example=SHAPE)
    # The changed method calls the published function, which is replaced.
    assert count_dcnv3(imported) == len(parts)
    methods = [check for check in imported.report if "Method" in check.source]
    assert {check.replaced for check in methods} == {True, False}
    image = random_image(SHAPE)
    (outputs,) = run_imported(imported, image)
    assert_close(outputs, [run_pytorch(model, image)])


def test_offsets_of_another_size_than_the_output():
    stride_2 = (3, 3, 2, 2, *ARGUMENTS[4:])
    kernel_1 = (1, 1, *ARGUMENTS[2:])
    message = r"size of the sampled map.*shape \(N, {}, channels\).*CUDA code does not check"
    core = other(lambda x, *_: x.view(-1, 2, 7))  # fails, as the published one does
    with SamplingReplacement():
        with pytest.raises(ModelImportError, match=message.format("3, 3")):
            core(*TENSORS, *stride_2)
        with pytest.raises(ModelImportError, match=message.format("7, 8")):
            core(TENSORS[0], torch.zeros(1, 5, 6, 4), torch.zeros(1, 5, 6, 2), *kernel_1)


def test_function_for_offsets_of_another_size_is_called_as_it_is():
    core = other(lambda x, o, m: (x, o[:, ::2, ::2], m[:, ::2, ::2]))
    stride_2 = (3, 3, 2, 2, *ARGUMENTS[4:])
    expected = core(*TENSORS, *stride_2)
    with SamplingReplacement() as sampling:
        torch.testing.assert_close(core(*TENSORS, *stride_2), expected)
    assert "offset does not have the output's size" in str(sampling.checks[0])
