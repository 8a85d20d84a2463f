"""Regions of autocast and of gradient modes are inlined."""

import pytest
import torch
from torch import nn

from dcnv3_tvm.frontend.torch.importer import import_model
from helpers import published_style_models as published
from helpers.imported_models import (
    assert_close,
    count_dcnv3,
    random_image,
    run_imported,
    run_pytorch,
)

SHAPE = (1, 3, 18, 26)


class Regions(nn.Module):
    """Has the operator, a buffer, constants and nested regions inside of regions."""

    def __init__(self, regions):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.dcn = published.DCNv3Cuda()
        self.head = nn.Conv2d(8, 4, 1)
        self.register_buffer("scale", torch.rand(8))
        self.regions = regions

    def forward(self, x):
        outer, inner = self.regions
        with outer():
            x = self.stem(x).permute(0, 2, 3, 1)
            with inner():
                y = self.dcn(x) * self.scale
            y = y * torch.tensor([2.0])
        with outer():
            return y, self.head(y.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    "regions",
    [
        (lambda: torch.autocast("cuda"), lambda: torch.autocast("cpu", enabled=False)),
        (torch.enable_grad, torch.no_grad),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad),
    ],
    ids=["autocast for another device", "gradients", "autocast"],
)
def test_regions_are_inlined(regions):
    model = published.randomised(Regions(regions))
    imported = import_model(model, example=SHAPE)
    assert count_dcnv3(imported) == 1
    assert set(imported.weights) == set(model.state_dict())
    # An autocast region is computed in float32: the type is chosen when the model is compiled.
    reference = Regions([torch.no_grad, torch.no_grad])
    reference.load_state_dict(model.state_dict())
    reference.dcn.__class__ = published.DCNv3Pytorch
    image = random_image(SHAPE)
    (outputs,) = run_imported(imported, image)
    assert_close(outputs, run_pytorch(reference, image))
