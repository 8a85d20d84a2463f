"""Models of several image sizes in one artifact, compared with those of one size."""

import argparse
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dcnv3_tvm as dt
from dcnv3_tvm import frontend, runtime, visualize
from dcnv3_tvm.cli import import_onnx, main, verify
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.compiler.image_sizes import join_sizes
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.models.internimage import DCNv3
from dcnv3_tvm.frontend.onnx import importer
from dcnv3_tvm.runtime.metadata import WEIGHTS
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.random_weights import randomize_
from helpers.encoders import gpu_launches, gpu_memory

pytestmark = pytest.mark.usefixtures("unoptimized")

CHANNELS = 16
SIZES = [(32, 32), (16, 96)]
PREPROCESSING = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


class Tiny(nn.Module):
    """A strided convolution, DCNv3, and a head; compiled in a second or two."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.dcn = DCNv3(CHANNELS, group=2)
        self.head = nn.Linear(CHANNELS, 5)

    def forward_pyramid(self, image):
        x = torch.relu(self.stem(image)).permute(0, 2, 3, 1)
        return [(x + self.dcn(x)).permute(0, 3, 1, 2)]

    def forward(self, image):
        return self.head(self.forward_pyramid(image)[0].mean((2, 3)))


def import_tiny(size, model=None, **options):
    model = model or randomize_(Tiny().eval(), seed=4)
    options = {"example": (1, 3, *size), "preprocessing": PREPROCESSING} | options
    return frontend.import_model(model, **options)


@pytest.fixture(scope="module")
def imported():
    model = randomize_(Tiny().eval(), seed=4)
    return [import_tiny(size, model) for size in SIZES]


@pytest.fixture(scope="module")
def artifact(imported, tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "artifact"
    dt.compile_artifact(imported, path, expose="offsets")
    return path


def results(model, image):
    """Return what the model returns for an image, in one list."""
    offsets = [tensor for pair in model.offsets(image) for tensor in pair]
    return [model(image), *model.features(image), *offsets]


@pytest.mark.parametrize("index", [0, 1])
def test_equal_to_a_model_of_one_size(index, imported, artifact, tmp_path, rng):
    several = dt.load(artifact, warm_up=True)
    assert several.metadata.image_sizes == SIZES
    path = tmp_path / "single"
    dt.compile_artifact(imported[index], path, expose="offsets")
    assert (path / WEIGHTS).stat().st_size == (artifact / WEIGHTS).stat().st_size
    one = dt.load(path)
    image = rng.standard_normal((1, 3, *SIZES[index]), np.float32)
    expected, found = results(one, image), results(several, image)
    assert len(found) == 1 + 1 + 2
    for output, reference in zip(found, expected, strict=True):
        np.testing.assert_array_equal(output, reference)
    blocks = visualize.capture_sampling(several, image)
    assert blocks[0].size == one.metadata.entries["offsets"].blocks[0].size
    assert several.profile(image, calls=1).kernels


def test_images_of_other_sizes(artifact):
    model = dt.load(artifact)
    wrong = r"got {}; allowed: 32x32, 16x96\. Resize or pad the image to {}, which is the nearest"
    for size, nearest in (((30, 40), "32x32"), ((16, 48), "16x96"), ((64, 16), "32x32")):
        expected = wrong.format("x".join(map(str, size)), nearest)
        with pytest.raises(InvalidArgumentError, match=expected):
            model(np.zeros((1, 3, *size), np.float32))
        with pytest.raises(InvalidArgumentError, match=expected):
            model.preprocess(np.zeros((*size, 3), np.uint8), size=size)
    # What is wrong but the size is said of the entry that takes it.
    with pytest.raises(InvalidArgumentError, match=r"NCHW \(1, 3, 16, 96\).*batch size"):
        model(np.zeros((2, 3, 16, 96), np.float32))
    with pytest.raises(InvalidArgumentError, match=r"NCHW is expected"):
        model(np.zeros((1, 16, 96, 3), np.float32))
    with pytest.raises(InvalidArgumentError, match="dimensions"):
        model.features(np.zeros((3, 16, 96), np.float32))
    with pytest.raises(InvalidArgumentError, match="is empty"):
        model(np.zeros((1, 3, 0, 64), np.float32))
    with pytest.raises(InvalidArgumentError, match="image is not a tensor"):
        model("photo.jpg")


def test_preprocessing_by_size(artifact):
    model = dt.load(artifact)
    picture = np.arange(40 * 80 * 3, dtype=np.uint8).reshape(40, 80, 3)
    for size, expected in ((None, (32, 32)), (32, (32, 32)), ((16, 96), (16, 96))):
        image = model.preprocess(picture, size=size)
        assert image.shape == (1, 3, *expected)
        single = runtime.preprocess(
            picture, PREPROCESSING | {"crop": expected, "resize": max(expected)}
        )
        np.testing.assert_array_equal(image, single)


def test_dynamic_batch(rng):
    model = randomize_(Tiny().eval(), seed=4)
    several = dt.compile_model(
        [import_tiny(size, model, dynamic_batch=True, features="never") for size in SIZES]
    )
    with torch.no_grad():
        for size in SIZES:
            for batch in (3, 0, 1):
                image = rng.standard_normal((batch, 3, *size), np.float32)
                expected = model(torch.from_numpy(image)).numpy()
                np.testing.assert_allclose(several(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_entries_share_storage(imported, dynamic_batch):
    """TVM's pool gives storage back only for a request of the same size."""
    target = resolve_target("auto")
    if dynamic_batch:
        model = randomize_(Tiny().eval(), seed=4)
        imported = [import_tiny(size, model, dynamic_batch=True) for size in SIZES]
    program, kernels = pipeline.run_pipeline(join_sizes(imported), target, expose=dynamic_batch)
    assert len(program.weights) == len({name.partition(":")[0] for name in program.weights})
    module, needed = pipeline.plan_memory(program, target)
    storage = {
        name: sorted(
            str(binding.value.args[0])
            for block in module[name].body.blocks
            for binding in block.bindings
            if getattr(getattr(binding.value, "op", None), "name", "")
            == "relax.memory.alloc_storage"
        )
        for name in program.entries
    }
    for function in ("main", "features", "offsets")[: len(program.entries) // 2]:
        assert storage[function]
        assert storage[function] == storage[f"{function}_16x96"]
    if not dynamic_batch:
        total = sum(int(re.search(r"\d+", size)[0]) for size in storage["features"])
        assert total == max(needed["features"], needed["features_16x96"])
    # The head is one kernel.
    assert len([name for name in kernels if name.startswith("matmul_16_5")]) == 1


def with_input(model, shape):
    """Change the shape of the image that an imported model says to take."""
    main_entry = model.entries["main"]
    image = dataclasses.replace(main_entry.inputs[0], shape=shape)
    entry = dataclasses.replace(main_entry, inputs=(image,))
    return dataclasses.replace(model, entries=model.entries | {"main": entry})


def test_imports_that_are_not_of_one_model(imported):
    first, second = imported
    with pytest.raises(InvalidArgumentError, match="two of the models have one image size; got 32"):
        join_sizes([first, second, first])
    with pytest.raises(InvalidArgumentError, match=r"fixed height and width.*Import it without"):
        join_sizes([first, with_input(second, (1, 3, "h", "w"))])
    weights = dict(second.weights)
    weights["head.bias"] = weights["head.bias"] + 1
    others = {
        "the weight head.bias differs": dataclasses.replace(second, weights=weights),
        "inputs differ": with_input(second, (2, 3, 16, 96)),
        "names differ": dataclasses.replace(second, name="other"),
        "entries differ": dataclasses.replace(second, entries={"main": second.entries["main"]}),
    }
    for message, other in others.items():
        with pytest.raises(InvalidArgumentError, match=message):
            join_sizes([first, other])
    with pytest.raises(InvalidArgumentError, match="no model to compile"):
        join_sizes([])
    with pytest.raises(InvalidArgumentError, match="the model is not imported; got Tiny"):
        dt.compile_model(Tiny())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_gpu(dtype, imported, gpu, tmp_path, rng):
    images = [rng.standard_normal((1, 3, *size), np.float32) for size in SIZES]
    with gpu.compiling():
        for name, models in (("several", imported), ("first", imported[0]), ("last", imported[1])):
            dt.compile_artifact(models, tmp_path / name, target="cuda-sm90", dtype=dtype)
    several = tmp_path / "several"
    assert (several / WEIGHTS).stat().st_size == (tmp_path / "first" / WEIGHTS).stat().st_size
    for name, image in zip(("first", "last"), images, strict=True):
        expected = gpu.run_model(tmp_path / name, [image])
        found = gpu.run_model(several, [image])
        for entry in ("main", "features"):
            for output, reference in zip(found[entry], expected[entry], strict=True):
                np.testing.assert_array_equal(output, reference)
        # Each entry has a graph of its own.
        assert gpu.call(gpu_launches, several, image)["main"] == ["launch", "graph", "launch"]
    # The image and the logits of the first size are all that its call adds.
    largest, both = (gpu.call(gpu_memory, several, given) for given in (images[1:], images))
    assert both - largest < images[0].nbytes + 4096


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(path)
    return path


def test_command_line(artifact, photo, tmp_path, capsys):
    def call(*arguments):
        code = main([*map(str, arguments)])
        return code, capsys.readouterr()

    code, captured = call("info", artifact)
    assert code == 0
    assert re.search(r"image sizes +32x32, 16x96", captured.out)
    assert "main_16x96" in (artifact / "README.md").read_text()
    assert "size=(32, 32); or (16, 96)" in (artifact / "README.md").read_text()
    expected = dt.load(artifact)
    for options, size in ((("--size", "16x96"), (16, 96)), ((), None)):
        code, captured = call("run", artifact, photo, *options, "--json")
        assert code == 0
        image = expected.preprocess(photo, size=size)
        classes, _ = runtime.top_k(expected(image), k=5)
        assert [row["class"] for row in json.loads(captured.out)["top"]] == classes[0].tolist()
    folder = tmp_path / "results"
    assert call("run", artifact, photo, "--size", "16x96", "-o", folder)[0] == 0
    image = expected.preprocess(photo, size=(16, 96))
    with np.load(folder / "photo.png.npz") as saved:
        np.testing.assert_array_equal(saved["logits"], expected(image))
    code, captured = call("run", artifact, photo, "--size", "17x96")
    assert code == 2
    assert "got 17x96; allowed: 32x32, 16x96" in captured.err
    results = tmp_path / "results.jsonl"
    results.write_text("{}")
    assert call("run", artifact, photo, "--size", "17x96", "-o", results)[0] == 2
    assert results.read_text() == "{}"
    page = tmp_path / "page.html"
    assert call("visualize", artifact, photo, "--size", "16x96", "-o", page)[0] == 0
    options = argparse.Namespace(seed=0, image=[photo], value_range=None)
    shapes = {name: array.shape for name, array in verify._inputs(expected, options).items()}
    assert shapes == {
        "random image 1x3x32x32 float32": (1, 3, 32, 32),
        "photo.png at 32x32": (1, 3, 32, 32),
        "random image 1x3x16x96 float32": (1, 3, 16, 96),
        "photo.png at 16x96": (1, 3, 16, 96),
    }


def test_compile_command(imported, tmp_path, capsys, monkeypatch):
    by_size = {(1, 3, *size): model for size, model in zip(SIZES, imported, strict=True)}
    monkeypatch.setattr(frontend, "import_model", lambda *_, example, **__: by_size[example])
    command = ["compile", "test_internimage_pre_norm", "--random-weights", "0", "-o"]
    sizes = ["--size", "32", "--size", "16x96"]
    assert main([*command, str(tmp_path / "a"), *sizes, "--size", "32x32", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert list(entries) == ["main", "features", "main_16x96", "features_16x96"]
    assert main([*command, str(tmp_path / "b"), *sizes, "--dynamic-size"]) == 2
    assert "a model with a dynamic size accepts any size" in capsys.readouterr().err


def test_shapes_of_an_onnx_file(monkeypatch):
    monkeypatch.setattr(importer, "input_shapes", lambda _: {"image": (1, 3, 32, 32)})
    given = {"model": "tiny.onnx", "batch": 1, "dynamic_batch": False, "size": None}
    assert import_onnx._shapes(argparse.Namespace(**given)) == [{}]
    arguments = argparse.Namespace(**given | {"size": [*SIZES, SIZES[0]]})
    assert import_onnx._shapes(arguments) == [{"image": (1, 3, *size)} for size in SIZES]
