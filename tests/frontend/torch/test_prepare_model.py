"""Published DCNv3 modules, in a copy of the model, call this library's operator."""

import re

import pytest
import torch
import tvm
from torch import nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.importer import import_model
from dcnv3_tvm.frontend.torch.prepare_model import prepare_model
from dcnv3_tvm.frontend.torch.replace_forward import compare_forward
from dcnv3_tvm.frontend.torch.replace_sampling import SamplingReplacement
from helpers import published_style_models as published
from helpers.imported_models import (
    assert_close,
    count_dcnv3,
    random_image,
    run_imported,
    run_pytorch,
)

SHAPE = (1, 3, 18, 26)
IMAGE = random_image(SHAPE)


@pytest.fixture(scope="module")
def imported_detector():
    return import_model(published.Detector(), example=SHAPE)


@pytest.mark.parametrize(
    "dcnv3",
    [
        published.DCNv3Cuda,
        published.DCNv3CudaOld,
        published.DCNv3Decorated,
        published.DCNv3Helper,
        published.DCNv3ThroughModule,
        published.DCNv3Attribute,
        published.DCNv3LateImport,
    ],
)
def test_every_way_to_call_the_core_gives_the_same_graph(dcnv3, imported_detector):
    model = published.Detector(dcnv3)
    imported = import_model(model, example=SHAPE)
    assert count_dcnv3(imported) == 2
    assert "forward" not in vars(model.blocks[0].dcn)
    tvm.ir.assert_structural_equal(imported.module, imported_detector.module)


def test_core_of_another_name_is_compared_and_replaced():
    model = published.randomised(published.Detector(published.DCNv3OtherName))
    imported = import_model(model, example=SHAPE)
    assert count_dcnv3(imported) == 2
    (outputs,) = run_imported(imported, IMAGE)
    assert_close(outputs, run_pytorch(model, IMAGE))


@pytest.mark.parametrize(
    "options",
    [
        {"center_feature_scale": True, "offset_scale": 2.0},
        {"remove_center": True, "kernel_size": 5, "pad": 4, "dilation": 2},
    ],
    ids=["gate", "remove-center"],
)
def test_options_of_the_module(options):
    reference = published.randomised(published.Detector(**options))
    model = published.Detector(published.DCNv3Cuda, **options)
    model.load_state_dict(reference.state_dict())
    assert model.eval() is None
    imported = import_model(model, example=SHAPE)
    outputs = [(m.name, m.layout, m.stride) for m in imported.entries["main"].outputs]
    assert outputs == [("feature_0", "NCHW", 2), ("feature_1", "NCHW", 4)]
    (outputs,) = run_imported(imported, IMAGE)
    assert_close(outputs, run_pytorch(reference, IMAGE))


def test_original_model_is_unchanged():
    model = published.randomised(published.Classifier())
    model.blocks[0].dcn.eval()
    modules = {name: (type(part), part.training) for name, part in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(part)) for name, part in model.named_modules()}
    core = published.dcnv3_core_pytorch
    import_model(model, example=SHAPE)
    assert {n: (type(part), part.training) for n, part in model.named_modules()} == modules
    assert {name: set(vars(part)) for name, part in model.named_modules()} == attributes
    assert all(block.with_cp for block in model.blocks)
    assert published.dcnv3_core_pytorch is core
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


class OnlyOnGpu(published.DCNv3Base):
    def forward(self, _):
        raise RuntimeError("only on a GPU")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Conv2d(3, 8, 3), "contains no DCNv3 module"),
        (lambda: published.Detector(OnlyOnGpu), "only on a GPU"),
    ],
    ids=["no DCNv3", "fails on the CPU"],
)
def test_modules_that_cannot_be_replaced(model, message):
    with pytest.raises(ModelImportError, match=message):
        import_model(model(), example=SHAPE)


class KeepsState(published.DCNv3OtherName):
    last = None

    def forward(self, x):
        y = super().forward(x)
        self.last = y if self.last is None else y + self.last
        return self.last


@pytest.mark.parametrize(
    ("dcnv3", "replaced", "outcome"),
    [
        (published.DCNv3OtherName, True, "computes DCNv3"),
        (published.DCNv3Different, False, "does not compute DCNv3"),
        (KeepsState, False, "not verified: .*it keeps state"),
        (OnlyOnGpu, False, "not verified: .*only on a GPU"),
    ],
)
def test_modules_are_compared(dcnv3, replaced, outcome):
    module = dcnv3()
    with SamplingReplacement() as sampling:
        check = compare_forward(module, "blocks.0.dcn", sampling)
    assert check.replaced is replaced
    assert re.match(rf"blocks\.0\.dcn \(.*{dcnv3.__name__}\): .*{outcome}", str(check))


def test_flag_of_dcnv4_is_cleared_and_reported():
    class ThroughDCNv4(published.DCNv3Pytorch):
        use_dcn_v4_op = True

        def forward(self, x):
            assert not self.use_dcn_v4_op
            return super().forward(x)

    model = ThroughDCNv4()
    with SamplingReplacement() as sampling:
        prepared = prepare_model(model, sampling)
    assert "use_dcn_v4_op=True lets the CUDA code of DCNv4" in str(prepared.dcnv3_modules[""])
    assert model.use_dcn_v4_op
    assert not prepared.model.use_dcn_v4_op
