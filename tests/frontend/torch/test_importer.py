"""Importing models: entries, names, weights, dynamic sizes, and errors for invalid arguments."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.factory import create_model
from dcnv3_tvm.frontend.torch.importer import import_model
from dcnv3_tvm.frontend.torch.preprocessing import check_labels
from dcnv3_tvm.pytorch import operator
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
def classifier():
    return published.randomised(published.Classifier())


@pytest.fixture(scope="module")
def imported_classifier(classifier):
    return import_model(classifier, example=SHAPE)


def to_nchw(maps):
    return [feature.permute(0, 3, 1, 2) for feature in maps]


def test_classifier_has_logits_and_features(imported_classifier):
    imported = imported_classifier
    assert imported.name == "classifier"
    assert (imported.config, imported.preprocessing) == ({}, {})
    assert (count_dcnv3(imported), count_dcnv3(imported, "features")) == (2, 2)
    (image,) = imported.entries["main"].inputs
    assert (image.name, image.shape, image.dtype, image.layout) == (
        "image",
        SHAPE,
        "float32",
        "NCHW",
    )
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


def test_classifier_computes_what_pytorch_does(classifier, imported_classifier):
    (logits,) = run_imported(imported_classifier, IMAGE)
    assert_close(logits, [run_pytorch(classifier, IMAGE)])
    (maps,) = run_imported(imported_classifier, IMAGE, entry="features")
    eager = copy.deepcopy(classifier).eval()
    assert_close(maps, to_nchw(eager.forward_features_seq_out(IMAGE)))


def test_weights_are_those_of_the_state_dict(classifier, imported_classifier):
    imported = imported_classifier
    state = classifier.state_dict()
    assert set(imported.weights) == {name for name in state if "num_batches_tracked" not in name}
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


def test_detector_returns_selected_maps():
    imported = import_model(published.Detector(out_indices=(1,)), example=SHAPE)
    assert list(imported.entries) == ["main"]
    (only,) = imported.entries["main"].outputs
    assert (only.name, only.shape, only.stride) == ("feature_0", (1, 16, 5, 7), 4)


@pytest.mark.parametrize("result", [published.Output, dict])
def test_structured_results(result):
    model = published.randomised(published.WithOutput(result=result))
    imported = import_model(model, example=SHAPE, name="wrapped")
    assert imported.name == "wrapped"
    assert [(o.name, o.layout, o.stride) for o in imported.entries["main"].outputs] == [
        ("hidden_states.0", "NHWC", 2),
        ("hidden_states.1", "NHWC", 4),
        ("logits", "", None),
    ]
    assert count_dcnv3(imported) == 4
    assert [o.layout for o in imported.entries["features"].outputs] == ["NCHW", "NCHW"]
    assert all(name.startswith("model.") for name in imported.weights)


def test_result_that_is_not_a_tensor_is_an_error():
    class ReturnsCount(published.Detector):
        def forward(self, x):
            return {"maps": super().forward(x), "count": 2}

    with pytest.raises(ModelImportError, match="count: int"):
        import_model(ReturnsCount(), example=SHAPE)


def test_dynamic_batch_and_size(classifier):
    imported = import_model(classifier, example=SHAPE, dynamic_batch=True, dynamic_size=True)
    assert imported.entries["main"].inputs[0].shape == ("n", 3, "h", "w")
    assert imported.entries["main"].outputs[0].shape == ("n", 10)
    first = imported.entries["features"].outputs[0]
    assert (first.shape[:2], first.layout, first.stride) == (("n", 8), "NCHW", 2)
    assert count_dcnv3(imported) == 2
    images = [random_image(shape) for shape in (SHAPE, (3, 3, 31, 9))]
    for image, outputs in zip(images, run_imported(imported, *images), strict=True):
        assert_close(outputs, [run_pytorch(classifier, image)])


def test_dynamic_batch_from_an_example_of_one():
    imported = import_model(published.Detector(), example=SHAPE, dynamic_batch=True)
    assert imported.entries["main"].inputs[0].shape == ("n", *SHAPE[1:])
    assert imported.entries["main"].outputs[0].shape == ("n", 8, 9, 13)


def test_internimage_keeps_its_configuration():
    model = create_model("test_internimage_res_post_norm", num_classes=np.int64(1000))
    imported = import_model(model, example=(1, 3, 64, 64))
    assert imported.name == "test_internimage_res_post_norm"
    assert imported.config["variant"] == "test_internimage_res_post_norm"
    assert json.dumps(imported.config["num_classes"]) == "1000"
    assert (imported.preprocessing["layout"], imported.preprocessing["crop"]) == ("NCHW", [64, 64])
    assert len(set(imported.labels)) == 1000
    assert (imported.labels[0], imported.labels[-1]) == ("tench", "toilet tissue")
    blocks = sum(model.config.depths)
    assert (count_dcnv3(imported), count_dcnv3(imported, "features")) == (blocks, blocks)
    assert [o.stride for o in imported.entries["features"].outputs] == [4, 8, 16, 32]


def test_features_never_and_always(classifier):
    assert list(import_model(classifier, example=SHAPE, features="never").entries) == ["main"]
    both = import_model(published.Detector(), example=SHAPE, features="always")
    assert list(both.entries) == ["main", "features"]


class CallsOperator(nn.Module):
    """A user's module that calls this library's operator itself."""

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


def test_module_that_calls_the_operator():
    model = published.randomised(CallsOperator())
    imported = import_model(torch.compile(model), example=SHAPE)
    assert imported.name == "calls_operator"
    (output,) = imported.entries["main"].outputs
    assert (output.name, output.layout, output.stride) == ("output", "NHWC", 1)
    assert set(imported.weights) == set(model.state_dict())
    (outputs,) = run_imported(imported, IMAGE)
    assert_close(outputs, [run_pytorch(model, IMAGE)])


def test_imports_in_several_threads():
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda _: import_model(CallsOperator(), example=SHAPE), range(4))
        assert [count_dcnv3(imported) for imported in found] == [1] * 4


def test_features_always_needs_a_pyramid_method():
    with pytest.raises(ModelImportError, match="no method that returns a feature pyramid"):
        import_model(CallsOperator(), example=SHAPE, features="always")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((1, 3, 0, 8), "empty; got shape"),
        ((), "not take the inputs"),
        ("photo.jpg", "example of x is not a tensor; got str.*Wrap a model"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "another dtype than the model"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.complex64), "another dtype than the model"),
        (torch.zeros(1, 3, 8, 8, device="meta"), "no values in memory"),
        (torch.zeros(1, 3, 8, 8).to_sparse(), "no values in memory"),
        (torch.quantize_per_tensor(torch.zeros(8), 0.1, 0, torch.quint8), "another dtype"),
        ({"image": SHAPE}, "missing a required argument: 'x'"),
        ((SHAPE, SHAPE), "forward.*too many positional arguments"),
    ],
    ids=lambda value: None if isinstance(value, str) else "example",
)
def test_invalid_examples(example, message):
    with pytest.raises((InvalidArgumentError, ModelImportError), match=message):
        import_model(published.Detector(), example=example)


def test_channels_last_example_gets_a_hint():
    with pytest.raises(ModelImportError, match="channels first"):
        import_model(published.Detector(), example=(1, 18, 26, 3))


def test_weights_must_be_float32_and_allocated():
    with pytest.raises(ModelImportError, match=r"not float32; got stem\.weight"):
        import_model(published.Detector().half(), example=SHAPE)
    with pytest.raises(ModelImportError, match="meta device"):
        import_model(published.Detector().to("meta"), example=SHAPE)


def test_torchscript_is_rejected_with_the_path():
    model = torch.nn.Sequential(CallsOperator(), torch.jit.script(torch.nn.ReLU()))
    with pytest.raises(ModelImportError, match=r"TorchScript.*got RecursiveScriptModule 1\."):
        import_model(model, example=SHAPE)


def test_labels_and_preprocessing_of_a_users_model():
    given = {"mean": (0.5, 0.5, 0.5), "std": np.full(3, 0.25), "interpolation": "bilinear"}
    labels = [f"class {number}" for number in range(10)]
    model = published.Classifier()
    imported = import_model(model, example=SHAPE, preprocessing=given, labels=labels)
    assert imported.labels == tuple(labels)
    assert json.loads(json.dumps(imported.preprocessing)) == {
        "resize": 26,
        "crop": [18, 26],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "layout": "NCHW",
    }
    with pytest.raises(InvalidArgumentError, match=r"number of labels.*got 9 labels; allowed: 10"):
        check_labels(labels[1:], imported.entries["main"].outputs)


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "got no std"),
        ({"mean": (0, 0, 0), "std": (1, 1, 0)}, "std is invalid"),
        ({"mean": "000", "std": (1, 1, 1)}, "mean is invalid"),
        ({"mean": (0, 0, 0), "std": (1, 1, 1), "size": 8}, "got size"),
        ({"mean": (0, 0, 0), "std": (1, 1, 1), "layout": "NHWC"}, "layout .* not that of the in"),
        (0.5, "not a mapping"),
    ],
)
def test_invalid_preprocessing(preprocessing, message):
    with pytest.raises(InvalidArgumentError, match=message):
        import_model(published.Detector(), example=SHAPE, preprocessing=preprocessing)


def test_preprocessing_needs_an_rgb_input():
    settings = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    for image in (torch.zeros(SHAPE).byte(), torch.zeros(1, 4, 18, 26), torch.zeros(1, 2, *SHAPE)):
        with pytest.raises(InvalidArgumentError, match="RGB images of float32"):
            import_model(published.Detector(), example=image, preprocessing=settings)


def test_invalid_module_and_features():
    with pytest.raises(InvalidArgumentError, match="not a PyTorch model; got function"):
        import_model(random_image, example=SHAPE)
    with pytest.raises(InvalidArgumentError, match="features is invalid"):
        import_model(published.Detector(), example=SHAPE, features=True)


class PooledToOnePixel(nn.Module):
    """Concatenates a map that has a single row if the image has 32."""

    def __init__(self):
        super().__init__()
        self.calls_operator = CallsOperator()

    def forward(self, image):
        pooled = nn.functional.max_pool2d(image, 1, 32)
        return self.calls_operator(image), torch.cat([pooled.flatten(2), image.flatten(2)], 2)


def test_example_with_a_map_of_one_pixel_cannot_be_dynamic():
    # torch.export concludes that a size of one stays one, which bounds the image size.
    with pytest.raises(ModelImportError, match=r"h <= 32.*more than one pixel"):
        import_model(PooledToOnePixel(), example=(1, 3, 32, 96), dynamic_size=True)
    import_model(PooledToOnePixel(), example=(1, 3, 64, 96), dynamic_size=True)
