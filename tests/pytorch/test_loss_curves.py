"""Training with the operator follows training with the published sampling in PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from dcnv3_tvm.pytorch import DCNv3
from dcnv3_tvm.verify.pytorch_reference import with_sampling

STEPS = 20


class Classifier(nn.Module):
    """Two deformable layers with the same parameters, so that few kernels are compiled."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1)
        self.layers = nn.Sequential(DCNv3(8, group=2), nn.GELU(), DCNv3(8, group=2))
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        return self.head(self.layers(self.stem(image).permute(0, 2, 3, 1)).mean((1, 2)))


def losses(model):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 1, 14, 18, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (16,), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    found = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_losses_agree_within_rounding_and_fall():
    torch.manual_seed(0)
    ours = Classifier().double()
    for module in ours.layers[::2]:
        nn.init.normal_(module.offset.bias)  # away from the kinks at integer coordinates
    published = with_sampling(ours)
    found, expected = losses(ours), losses(published)
    # Each step multiplies the rounding of float64, 1e-16, by a small factor.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert found[-1] < found[0] - 0.01
    assert ours.layers[0].offset.weight.abs().max() > 0.01
