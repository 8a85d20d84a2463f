"""A Conv-BN-Act block with DCNv3 on NCHW maps, for YOLO and U-Net models, trained in a small U-Net.

    python examples/conv_bn_act.py

The task is made up: find the discs in noisy images.
"""

import argparse

import torch
from torch import Tensor, nn

from dcnv3_tvm.pytorch import DCNv3


class DCNv3BNAct(nn.Module):
    """1x1 convolution, DCNv3, BatchNorm and SiLU: (N, C1, H, W) to (N, C2, H/stride, W/stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        group: int = 4,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.dcnv3 = DCNv3(
            out_channels, kernel_size=kernel_size, stride=stride, group=group, softmax=True
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map."""
        # DCNv3 is channels-last; permute only makes views.
        y = self.dcnv3(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        result: Tensor = self.act(self.bn(y))
        return result


class UNet(nn.Module):
    """Two scales, with a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, kernel_size=3, padding=1)
        self.down = DCNv3BNAct(channels, 2 * channels, stride=2)
        self.up = nn.Upsample(scale_factor=2)
        self.outer = DCNv3BNAct(3 * channels, channels)
        self.head = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return a logit for each pixel."""
        skip = self.stem(image)
        inner = self.up(self.down(skip))
        result: Tensor = self.head(self.outer(torch.cat([skip, inner], dim=1)))
        return result


def draw_discs(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Draw a noisy image of one disc each; return images and masks (N, 1, size, size)."""
    places = torch.arange(size)
    x, y, radius = (torch.rand(3, count, 1, 1) * torch.tensor([1, 1, 0.2]).view(3, 1, 1, 1)) * size
    inside = (places - x) ** 2 + (places[:, None] - y) ** 2 < (radius + size / 8) ** 2
    mask = inside[:, None].float()
    return mask + 0.7 * torch.randn_like(mask), mask


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument("--size", type=int, default=32, help="height and width (default: 32)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = UNet(channels=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(arguments.steps):
        image, mask = draw_discs(16, arguments.size)
        loss = nn.functional.binary_cross_entropy_with_logits(model(image), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")

    image, mask = draw_discs(16, arguments.size)
    with torch.no_grad():
        found = model.eval()(image) > 0
    right = (found == mask.bool()).float().mean()
    print(f"{100 * right:.1f} % of the pixels of new images are right")


if __name__ == "__main__":
    main()
