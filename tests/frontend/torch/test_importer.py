import copy

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from torch.export import ExportedProgram
from tvm import relax

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.factory import create_model
from dcnv3_tvm.frontend.torch.importer import import_model
from dcnv3_tvm.op import relax_op
from dcnv3_tvm.pytorch import operator
from dcnv3_tvm.verify.tolerances import MODEL
from helpers import published_style_models as twin

SHAPE = (1, 3, 18, 26)


def calls(imported, entry="main"):
    found = []
    relax.analysis.post_order_visit(
        imported.module[entry], lambda e: found.append(e) if relax_op.is_dcnv3(e) else None
    )
    return len(found)


def outputs(imported, image):
    """Compile with TVM's own pipeline and run every entry."""
    machine = relax.VirtualMachine(tvm.compile(imported.module, "llvm"), tvm.cpu())
    results = {}
    for name, entry in imported.entries.items():
        weights = [tvm.runtime.tensor(imported.weights[weight]) for weight in entry.weights]
        returned = machine[name](tvm.runtime.tensor(image.numpy()), *weights)
        results[name] = [np.asarray(tensor.numpy()) for tensor in returned]
        for result, info in zip(results[name], entry.outputs, strict=True):
            sizes = zip(result.shape, info.shape, strict=True)
            assert all(isinstance(named, str) or size == named for size, named in sizes)
    return results


def assert_close(got, expected):
    assert len(got) == len(expected)
    for result, tensor in zip(got, expected, strict=True):
        reference = tensor.detach().numpy()
        assert result.shape == reference.shape
        assert np.abs(result - reference).max() <= MODEL["float32"] * np.abs(reference).max()


def run(model, image):
    """Run a twin as it is for inference, its sampling by grid_sample."""
    model = copy.deepcopy(model)
    for part in model.modules():
        part.training = False
    with torch.no_grad():
        return model(image)


def nchw(maps):
    return [feature.permute(0, 3, 1, 2) for feature in maps]


def image(shape=SHAPE, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_classifier_and_its_pyramid():
    model = twin.randomised(twin.Classifier())
    imported = import_model(model, example=SHAPE)
    assert imported.name == "classifier"
    assert (imported.config, imported.preprocessing) == ({}, {})
    assert (calls(imported), calls(imported, "features")) == (2, 2)
    (logits,) = imported.entries["main"].outputs
    assert (logits.name, logits.shape, logits.layout, logits.stride) == (
        "logits",
        (1, 10),
        "",
        None,
    )
    maps = imported.entries["features"].outputs
    assert [(m.name, m.shape, m.layout, m.stride) for m in maps] == [
        ("feature_0", (1, 8, 9, 13), "NCHW", 2),
        ("feature_1", (1, 16, 5, 7), "NCHW", 4),
    ]
    (given,) = imported.entries["main"].inputs
    assert (given.name, given.shape, given.dtype, given.layout) == (
        "image",
        SHAPE,
        "float32",
        "NCHW",
    )

    results = outputs(imported, image())
    assert_close(results["main"], [run(model, image())])
    eager = copy.deepcopy(model).eval()
    assert_close(results["features"], nchw(eager.forward_features_seq_out(image())))


def test_weights_are_those_of_the_state_dict():
    model = twin.randomised(twin.Classifier())
    imported = import_model(model, example=SHAPE)
    state = model.state_dict()
    expected = {name for name in state if "num_batches_tracked" not in name}
    assert set(imported.weights) == expected
    for name, weight in imported.weights.items():
        np.testing.assert_array_equal(weight, state[name].numpy())
        assert weight.ctypes.data == state[name].data_ptr(), "copied"
    features = imported.entries["features"].weights
    assert not any(name.startswith(("head", "conv_head")) for name in features)
    for name, entry in imported.entries.items():
        parameters = imported.module[name].params
        assert len(parameters) == 1 + len(entry.weights)
        for parameter, weight in zip(parameters[1:], entry.weights, strict=True):
            sizes = [int(size) for size in parameter.ty.shape]
            assert sizes == list(imported.weights[weight].shape)


def test_leaves_the_model_alone():
    model = twin.randomised(twin.Classifier())
    model.blocks[0].dcn.eval()
    modules = {name: (type(part), part.training) for name, part in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(part)) for name, part in model.named_modules()}
    core = twin.dcnv3_core_pytorch
    import_model(model, example=SHAPE)
    assert {n: (type(part), part.training) for n, part in model.named_modules()} == modules
    assert {name: set(vars(part)) for name, part in model.named_modules()} == attributes
    assert all(block.with_cp for block in model.blocks)
    assert twin.dcnv3_core_pytorch is core
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


CORES = [
    twin.DCNv3Cuda,
    twin.DCNv3CudaOld,
    twin.DCNv3Decorated,
    twin.DCNv3Helper,
    twin.DCNv3ThroughModule,
    twin.DCNv3Attribute,
]


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.__name__)
def test_every_way_to_the_core_gives_the_same_graph(core):
    expected = import_model(twin.Detector(), example=SHAPE)
    model = twin.Detector(core)
    imported = import_model(model, example=SHAPE)
    assert calls(imported) == 2
    assert "forward" not in vars(model.blocks[0].dcn)
    tvm.ir.assert_structural_equal(imported.module, expected.module)


def test_a_core_of_another_name_is_compared_with_the_published_one():
    model = twin.randomised(twin.Detector(twin.DCNv3Inlined))
    imported = import_model(model, example=SHAPE)
    assert calls(imported) == 2
    assert_close(outputs(imported, image())["main"], run(model, image()))


@pytest.mark.parametrize(
    "options",
    [
        {"center_feature_scale": True, "offset_scale": 2.0},
        {"remove_center": True, "kernel_size": 5, "pad": 4, "dilation": 2},
    ],
    ids=["gate", "remove-center"],
)
def test_detector_with_options(options):
    reference = twin.randomised(twin.Detector(**options))
    model = twin.Detector(twin.DCNv3Cuda, **options)
    model.load_state_dict(reference.state_dict())
    assert model.eval() is None
    imported = import_model(model, example=SHAPE)
    assert list(imported.entries) == ["main"]
    names = [(m.name, m.layout, m.stride) for m in imported.entries["main"].outputs]
    assert names == [("feature_0", "NCHW", 2), ("feature_1", "NCHW", 4)]
    assert_close(outputs(imported, image())["main"], run(reference, image()))


def test_chosen_maps():
    imported = import_model(twin.Detector(out_indices=(1,)), example=SHAPE)
    (only,) = imported.entries["main"].outputs
    assert (only.name, only.shape, only.stride) == ("feature_0", (1, 16, 5, 7), 4)


@pytest.mark.parametrize("result", [twin.Output, dict])
def test_structured_results(result):
    model = twin.randomised(twin.WithOutput(result=result))
    imported = import_model(model, example=SHAPE, name="wrapped")
    assert imported.name == "wrapped"
    found = [(o.name, o.layout, o.stride) for o in imported.entries["main"].outputs]
    assert found == [
        ("hidden_states.0", "NHWC", 2),
        ("hidden_states.1", "NHWC", 4),
        ("logits", "", None),
    ]
    assert calls(imported) == 4
    assert [o.layout for o in imported.entries["features"].outputs] == ["NCHW", "NCHW"]
    assert all(name.startswith("model.") for name in imported.weights)
    if result is twin.Output:
        expected = run(model, image())
        results = outputs(imported, image())
        assert_close(results["main"], [*expected.hidden_states, expected.logits])
        assert_close(results["features"], nchw(expected.hidden_states))


def test_dynamic_batch_and_size():
    model = twin.randomised(twin.Classifier())
    imported = import_model(model, example=SHAPE, dynamic_batch=True, dynamic_size=True)
    assert imported.entries["main"].inputs[0].shape == ("n", 3, "h", "w")
    assert imported.entries["main"].outputs[0].shape == ("n", 10)
    first = imported.entries["features"].outputs[0]
    assert (first.shape[:2], first.layout, first.stride) == (("n", 8), "NCHW", 2)
    assert calls(imported) == 2
    machine = relax.VirtualMachine(tvm.compile(imported.module, "llvm"), tvm.cpu())
    weights = [tvm.runtime.tensor(imported.weights[w]) for w in imported.entries["main"].weights]
    for shape in ((1, 3, 18, 26), (3, 3, 31, 9)):
        (result,) = machine["main"](tvm.runtime.tensor(image(shape).numpy()), *weights)
        assert_close([result.numpy()], [run(model, image(shape))])


def test_dynamic_batch_alone_from_an_example_of_one():
    imported = import_model(twin.Detector(), example=SHAPE, dynamic_batch=True)
    assert imported.entries["main"].inputs[0].shape == ("n", *SHAPE[1:])
    assert imported.entries["main"].outputs[0].shape == ("n", 8, 9, 13)


def test_own_model_carries_its_configuration():
    model = create_model("test_internimage_res_post_norm")
    imported = import_model(model, example=(1, 3, 64, 64))
    assert imported.name == "test_internimage_res_post_norm"
    assert imported.config["variant"] == "test_internimage_res_post_norm"
    assert imported.preprocessing["layout"] == "NCHW"
    blocks = sum(model.config.depths)
    assert (calls(imported), calls(imported, "features")) == (blocks, blocks)
    assert [o.stride for o in imported.entries["features"].outputs] == [4, 8, 16, 32]


def test_features_on_request():
    assert list(import_model(twin.Classifier(), example=SHAPE, features="never").entries) == [
        "main"
    ]
    both = import_model(twin.Detector(), example=SHAPE, features="always")
    assert list(both.entries) == ["main", "features"]


class OwnModule(nn.Module):
    """Anybody's module that calls this library's operator."""

    def __init__(self):
        super().__init__()
        self.offset, self.mask = nn.Conv2d(8, 36, 1), nn.Conv2d(8, 18, 1)
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.register_buffer("scale", torch.full((8,), 0.5), persistent=False)

    def forward(self, x):
        x = self.stem(x)
        offset, mask = (part(x).permute(0, 2, 3, 1) for part in (self.offset, self.mask))
        y = operator.dcnv3(x.permute(0, 2, 3, 1), offset, mask, group=2)
        return 1 - self.norm(y) * self.scale


def test_a_module_that_calls_the_operator_itself():
    model = twin.randomised(OwnModule())
    imported = import_model(torch.compile(model), example=SHAPE)
    assert imported.name == "own_module"
    (output,) = imported.entries["main"].outputs
    assert (output.name, output.layout, output.stride) == ("output", "NHWC", 1)
    assert set(imported.weights) == set(model.state_dict())
    assert_close(outputs(imported, image())["main"], [run(model, image())])


def test_features_always_needs_a_pyramid():
    with pytest.raises(ModelImportError, match="offers no feature pyramid"):
        import_model(OwnModule(), example=SHAPE, features="always")


def test_refuses_a_model_without_dcnv3():
    with pytest.raises(ModelImportError, match="contains no DCNv3 module; got Conv2d"):
        import_model(nn.Conv2d(3, 8, 3), example=SHAPE)


def test_refuses_a_module_that_computes_something_else():
    with pytest.raises(ModelImportError, match=r"not compute the published.* blocks\.0\.dcn"):
        import_model(twin.Detector(twin.DCNv3Different), example=SHAPE)


class Broken(twin.DCNv3Base):
    def forward(self, _):
        raise RuntimeError("only on a GPU")


def test_refuses_a_module_that_cannot_be_compared():
    with pytest.raises(ModelImportError, match=r"blocks\.0\.dcn .*only on a GPU"):
        import_model(twin.Detector(Broken), example=SHAPE)


def test_refuses_a_core_that_is_found_when_it_runs():
    with pytest.raises(ModelImportError, match=r"without it: blocks\.0\.dcn, blocks\.1\.dcn"):
        import_model(twin.Detector(twin.DCNv3LateImport), example=SHAPE)


class Unsupported(twin.Detector):
    def forward(self, x):
        first, second = super().forward(x)
        return torch.special.bessel_j0(first), torch.linalg.svdvals(second)


def test_lists_every_unsupported_node_with_its_line():
    with pytest.raises(ModelImportError) as caught:
        import_model(Unsupported(), example=SHAPE)
    message = str(caught.value)
    assert "2 operations that cannot become Relax" in message
    assert "special_bessel_j0" in message
    assert "linalg_svd" in message
    assert "return torch.special.bessel_j0(first), torch.linalg.svdvals(second)" in message
    assert "test_importer.py" in message


class Returns(twin.Detector):
    def forward(self, x):
        return {"maps": super().forward(x), "count": 2}


class Pieces(twin.Detector):
    """Casts, repeats and a change in place, behind the model."""

    def __init__(self, *, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, x):
        first, second = super().forward(x)
        same = second.to(torch.float32) - first.double().float().mean()
        if self.in_place:
            same[:, 1:3].mul_(2)
        return [same, *(same.repeat_interleave(3, dim) for dim in (None, 0, 1, -1))]


@pytest.mark.parametrize("in_place", [False, True])
def test_pieces_that_are_decomposed_only_where_they_have_to_be(in_place, monkeypatch):
    decomposed = []
    decompose = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram,
        "run_decompositions",
        lambda self, table: decomposed.append(table) or decompose(self, table),
    )
    model = twin.randomised(Pieces(in_place=in_place))
    imported = import_model(model, example=SHAPE, features="never")
    assert bool(decomposed) == in_place
    assert "astype" in imported.module.script()
    assert_close(outputs(imported, image())["main"], run(model, image()))


def test_refuses_a_result_that_is_no_tensor():
    with pytest.raises(ModelImportError, match="count: int"):
        import_model(Returns(), example=SHAPE)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((3, 224, 224), r"no batch of images; got shape \(3, 224, 224\)"),
        ((1, 3, 0, 8), "no batch of images"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "another dtype than the model"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "another dtype than the model"),
    ],
)
def test_refuses_examples(example, message):
    with pytest.raises(InvalidArgumentError, match=message):
        import_model(twin.Detector(), example=example)


def test_an_example_with_channels_last_gets_a_hint():
    with pytest.raises(ModelImportError, match="channels first"):
        import_model(twin.Detector(), example=(1, 18, 26, 3))


def test_refuses_any_size_for_a_head_that_cannot_have_it():
    whole = create_model("internimage_h", device="meta")
    with pytest.raises(InvalidArgumentError, match="needs a fixed image size"):
        import_model(whole, dynamic_size=True)
    for model, dynamic_size in (
        (whole, False),
        (create_model("internimage_h", features_only=True, device="meta"), True),
        (create_model("internimage_t", device="meta"), True),
    ):
        with pytest.raises(ModelImportError, match="meta device"):
            import_model(model, dynamic_size=dynamic_size)


def test_refuses_half_and_meta_models():
    with pytest.raises(ModelImportError, match=r"not float32; got stem\.weight"):
        import_model(twin.Detector().half(), example=SHAPE)
    with pytest.raises(ModelImportError, match="meta device"):
        import_model(twin.Detector().to("meta"), example=SHAPE)


def test_refuses_what_is_no_module():
    with pytest.raises(InvalidArgumentError, match="no PyTorch model; got function"):
        import_model(image, example=SHAPE)
    with pytest.raises(InvalidArgumentError, match="features is not known"):
        import_model(twin.Detector(), example=SHAPE, features=True)


def test_refuses_an_example_that_would_bound_the_size():
    """The map that has one pixel may have only one, by what torch.export concludes."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = twin.Classifier()

        def forward(self, image):
            pooled = nn.functional.max_pool2d(image, 1, 32)
            return self.classifier(image), torch.cat([pooled.flatten(2), image.flatten(2)], 2)

    with pytest.raises(ModelImportError, match=r"h <= 32.*large enough"):
        import_model(Pooled(), example=(1, 3, 32, 96), dynamic_size=True)
    import_model(Pooled(), example=(1, 3, 64, 96), dynamic_size=True)
