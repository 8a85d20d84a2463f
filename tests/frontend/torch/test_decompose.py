"""Operators without a converter are decomposed, or listed in an error."""

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.importer import import_model
from dcnv3_tvm.pytorch import operator
from helpers import published_style_models as published
from helpers.imported_models import assert_close, random_image, run_imported, run_pytorch

SHAPE = (1, 3, 18, 26)


class AfterDCNv3(nn.Module):
    """The operator, followed by a function of its result (N, H, W, 8)."""

    def __init__(self, function):
        super().__init__()
        self.x, self.offset, self.mask = (nn.Conv2d(3, channels, 1) for channels in (8, 2, 1))
        self.function = function

    def forward(self, image):
        x, offset, mask = (
            part(image).permute(0, 2, 3, 1) for part in (self.x, self.offset, self.mask)
        )
        y = operator.dcnv3(x, offset, mask, group=1, kernel_size=1, pad=0)
        return self.function(y)


def casts_and_repeats(x):
    same = x.to(torch.float32) - x.double().float().mean()
    return [same, *(same.repeat_interleave(3, dim) for dim in (None, 0, 1, -1))]


def change_in_place(x):
    same = x + 1
    same[:, 1:3].mul_(2)
    return same


@pytest.mark.parametrize(
    ("function", "is_decomposed"), [(casts_and_repeats, False), (change_in_place, True)]
)
def test_programs_are_decomposed_only_if_needed(function, is_decomposed, monkeypatch):
    calls = []
    run_decompositions = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram,
        "run_decompositions",
        lambda self, table: calls.append(table) or run_decompositions(self, table),
    )
    model = published.randomised(AfterDCNv3(function))
    imported = import_model(model, example=SHAPE)
    assert bool(calls) == is_decomposed
    image = random_image(SHAPE)
    expected = run_pytorch(model, image)
    (outputs,) = run_imported(imported, image)
    assert_close(outputs, expected if isinstance(expected, list) else [expected])


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x), torch.linalg.svdvals(x)


def test_every_unsupported_operator_is_listed_with_its_source_line():
    with pytest.raises(ModelImportError) as caught:
        import_model(AfterDCNv3(Unsupported()), example=SHAPE)
    message = str(caught.value)
    assert "2 operators that cannot be converted to Relax" in message
    assert "special_bessel_j0" in message
    assert "linalg_svd" in message
    assert "return torch.special.bessel_j0(x), torch.linalg.svdvals(x)" in message
    assert "test_decompose.py" in message
