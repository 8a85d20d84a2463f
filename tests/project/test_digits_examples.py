"""The digit examples in few steps, and the weights that they ship."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from dcnv3_tvm import frontend
from dcnv3_tvm.pytorch import DCNv3
from dcnv3_tvm.verify.compare import ReferenceOperator
from dcnv3_tvm.verify.pytorch_reference import with_sampling

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WEIGHTS = EXAMPLES / "digits_internimage.safetensors"
GALLERY = EXAMPLES.parent / "docs" / "images"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Import an example as Python does that runs it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(importlib.import_module("digits"), "COPIES", 1)
    return importlib.import_module


def run(main, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["example", *arguments])
    assert main() == 0


def test_no_digit_is_both_trained_with_and_held_out(example):
    trained, held_out = (part.images.flatten(1) for part in example("digits").load())
    assert len(trained) + len(held_out) == 1797
    assert torch.cdist(trained, held_out).min() > 0


def test_images_depend_on_the_seed_only(example):
    digits = example("digits")
    images = digits.load()[1].images[:5]
    first, same, other = (
        digits.cluttered(images, Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert first.shape == (5, 3, digits.SIZE, digits.SIZE)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_shipped_weights_classify_and_deform(example):
    digits = example("digits")
    assert WEIGHTS.stat().st_size < 1e6
    # PyTorch's sampling has no kernels to compile.
    model = with_sampling(frontend.create_model("digits_internimage", checkpoint=WEIGHTS))
    offsets = []
    for module in model.modules():
        if isinstance(module, DCNv3):
            module.offset.register_forward_hook(lambda *call: offsets.append(call[-1]))
    _, held_out = digits.load()
    assert digits.accuracy(model, held_out, digits.cluttered) > 80
    assert offsets[0].abs().mean() > 0.1  # pixels


@pytest.mark.slow
def test_gallery_is_drawn(example, monkeypatch, tmp_path):
    with ReferenceOperator():
        monkeypatch.setattr("sys.argv", ["example", "--output", str(tmp_path)])
        example("visualize_digits").main()
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert drawn.keys() == {path.name for path in GALLERY.iterdir()}
    assert max(size for name, size in drawn.items() if name.endswith(".png")) < 60e3


@pytest.mark.slow
def test_training_writes_weights_that_load(example, monkeypatch, tmp_path, capsys):
    module = example("train_digits")
    monkeypatch.setattr(module, "check_compiled", lambda *_: True)
    path = tmp_path / "weights.safetensors"
    run(module.main, monkeypatch, "--steps", "3", "--output", str(path))
    assert "step     3  loss" in capsys.readouterr().out
    frontend.create_model("digits_internimage", checkpoint=path)


@pytest.mark.slow
def test_offsets_stay_zero_without_deforming(example):
    model = example("train_digits").trained_model(2, seed=0, deform=False)
    layers = [module for module in model.modules() if isinstance(module, DCNv3)]
    assert not any(parameter.any() for layer in layers for parameter in layer.offset.parameters())
    assert all(layer.mask.weight.any() for layer in layers[:3])


@pytest.mark.slow
def test_fine_tuning_reduces_the_loss(example, monkeypatch, capsys):
    module = example("fine_tune")
    monkeypatch.setattr(module, "accuracy", lambda *_: 12.5)
    monkeypatch.setattr(module, "check_compiled", lambda *_: True)
    run(module.main, monkeypatch, "--steps", "20")
    shown = capsys.readouterr().out
    assert "accuracy before: 12.50 %" in shown
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", shown)]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.slow
def test_compiled_models_are_as_accurate(example, capsys):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, kernel_size=4, stride=4)
            self.deform = DCNv3(16, group=2)
            self.head = nn.Linear(16, 10)

        def forward(self, image):
            return self.head(self.deform(self.stem(image).permute(0, 2, 3, 1)).mean((1, 2)))

    digits = example("digits")
    torch.manual_seed(0)
    model = Classifier().eval().requires_grad_(False)
    assert digits.check_compiled(model, digits.load()[1], digits.cluttered)
    assert "compiled in float32" in capsys.readouterr().out
