"""Train the published InternImage code, as it is, through the stand-in for its extension.

    python tests/pytorch/check_published.py InternImage/classification

takes the folder of a checkout (which needs timm, and setuptools below 82 for pkg_resources) and

1. runs ``ops_dcnv3/test.py`` without its timing, and counts the lines that say True;
2. does a training step of the published InternImage-T, and of a block in the manner of YOLO forks,
   with ``core_op="DCNv3"``, in float64, float32 and under bfloat16 autocast, and compares every
   gradient with ``core_op="DCNv3_pytorch"`` in float64.

Changed, in this process only: ``torch.Tensor.cuda`` does nothing where there is no GPU; the
coordinates of the PyTorch code are float64, as its tensors are, not float32; the projections to
offsets and mask are random, because at their initial value of zero all points lie on pixels, where
the derivative by the offset jumps.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcnv3_tvm.pytorch import extensions

SIZES = {"channels": 64, "depths": [4, 4, 18, 4], "groups": [4, 8, 16, 32], "num_classes": 10}
"""InternImage-T."""

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative L2 error of the gradient of each parameter."""

AUTOCAST_FACTOR = 1.5
"""Error under autocast, relative to that of the PyTorch code.

The extension takes the mask and returns the result in bfloat16, where that code keeps float32.
"""

SMALL = 1e-3
"""Gradients below this part of the whole are compared with it: some are zero, before BatchNorm."""

Build = Callable[[str], nn.Module]


class YoloBlock(nn.Module):
    """Conv-BN-SiLU around a published DCNv3 module, on NCHW maps."""

    def __init__(self, dcnv3: Callable[..., nn.Module], channels: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.dcnv3 = dcnv3(channels=channels, kernel_size=3, stride=1, group=4)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, image: Tensor) -> Tensor:
        """Return (N, C)."""
        y = self.dcnv3(self.conv(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return nn.functional.silu(self.bn(y)).square().mean((2, 3))


def run_own_test(folder: Path) -> int:
    """Run the published test; return how many of its 44 lines say True."""
    source = (folder / "test.py").read_text(encoding="utf-8")
    source = source.replace("check_time_cost(im2col_step)\n", "break\n")
    sys.path.insert(0, str(folder))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, str(folder / "test.py"), "exec"), {"__name__": "__main__"})
    sys.path.remove(str(folder))
    lines = [line for line in output.getvalue().splitlines() if line.startswith("* ")]
    print(*(line for line in lines if not line.startswith("* True")), sep="\n", end="")
    return sum(line.startswith("* True") for line in lines)


@contextlib.contextmanager
def float64_coordinates(folder: Path) -> Iterator[None]:
    """Let the published PyTorch code compute coordinates in float64."""
    path = folder / "functions" / "dcnv3_func.py"
    changed: dict[str, Any] = {"__name__": "float64_dcnv3_func"}
    source = path.read_text(encoding="utf-8").replace("torch.float32", "torch.float64")
    exec(compile(source, str(path), "exec"), changed)
    names = vars(importlib.import_module("ops_dcnv3.modules.dcnv3"))
    original = names["dcnv3_core_pytorch"]
    names["dcnv3_core_pytorch"] = changed["dcnv3_core_pytorch"]
    try:
        yield
    finally:
        names["dcnv3_core_pytorch"] = original


def train_step(
    model: nn.Module, image: Tensor, dtype: torch.dtype, *, autocast: bool = False
) -> list[Tensor]:
    """Do a step of AdamW; return the gradients of all parameters in float64."""
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(image.to(dtype))
    nn.functional.cross_entropy(logits.to(dtype), torch.arange(len(image))).backward()
    before = [each.detach().clone() for each in model.parameters()]
    optimizer.step()
    if any(map(torch.equal, before, model.parameters())):
        raise SystemExit("a parameter did not change")
    return [each.grad.double() for each in model.parameters() if each.grad is not None]


def errors(gradients: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Return the relative L2 error of all gradients together, and the largest of one parameter."""
    norms = torch.stack([each.norm() for each in expected])
    differences = torch.stack(
        [(got - want).norm() for got, want in zip(gradients, expected, strict=True)]
    )
    worst = (differences / norms.clamp_min(SMALL * float(norms.norm()))).max()
    return float(differences.norm() / norms.norm()), float(worst)


def compare(name: str, build: Build, image: Tensor, folder: Path) -> bool:
    """Compare the gradients of a model through the extension with those of the PyTorch code."""
    reference = build("DCNv3_pytorch")
    for key, each in reference.named_parameters():
        if ".offset." in key or ".mask." in key:
            nn.init.normal_(each, std=0.5 if key.endswith("bias") else each.shape[-1] ** -0.5)
    weights = {key: each.clone() for key, each in reference.state_dict().items()}
    with float64_coordinates(folder):
        expected = train_step(reference, image, torch.float64)

    def step(core_op: str, dtype: torch.dtype, *, autocast: bool = False) -> tuple[float, float]:
        model = build(core_op)
        model.load_state_dict(weights)
        return errors(train_step(model, image, dtype, autocast=autocast), expected)

    passed = True
    for dtype, tolerance in TOLERANCES.items():
        overall, worst = step("DCNv3", dtype)
        passed &= worst < tolerance
        print(f"{name}, {dtype}: relative error {overall:.1e}, of one parameter {worst:.1e}")
    overall, _ = step("DCNv3", torch.float32, autocast=True)
    pytorch, _ = step("DCNv3_pytorch", torch.float32, autocast=True)
    print(f"{name}, autocast: relative error {overall:.1e}, of the PyTorch code {pytorch:.1e}")
    return passed and overall < AUTOCAST_FACTOR * pytorch


def main() -> int:
    """Run all checks; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="the folder InternImage/classification")
    parser.add_argument("--size", type=int, default=64, help="image size (default: 64)")
    arguments = parser.parse_args()
    folder = arguments.checkout.absolute()
    print(extensions.install())
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda tensor, *_arguments, **_keywords: tensor  # type: ignore[method-assign]
    true = run_own_test(folder / "ops_dcnv3")
    print(f"test.py: {true} of 44 lines say True")

    sys.path.insert(0, str(folder))
    modules = importlib.import_module("ops_dcnv3.modules")
    intern_image = importlib.import_module("models.intern_image")
    torch.manual_seed(0)
    image = torch.randn(2, 3, arguments.size, arguments.size)

    def block(core_op: str) -> nn.Module:
        return YoloBlock(getattr(modules, core_op))

    def internimage_t(core_op: str) -> nn.Module:
        with contextlib.redirect_stdout(io.StringIO()):
            model: nn.Module = intern_image.InternImage(core_op, drop_path_rate=0.0, **SIZES)
        return model

    passed = [
        compare(name, build, image, folder / "ops_dcnv3")
        for name, build in (("YOLO block", block), ("InternImage-T", internimage_t))
    ]
    return 0 if true == 44 and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
