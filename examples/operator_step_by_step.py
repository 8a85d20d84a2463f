# %% [markdown]
r"""
# The operator, step by step

DCNv3 looks at the input in places that it computes from the input. This notebook takes it apart:
each step is a function of a few lines, a term of the equation, a picture, and a comparison with
the library.

For output pixel $p$, group $g$ of $G$ and the $K$ points of a kernel ($K = 9$ for 3x3), the
published code computes

$$
y(p) \;=\; \operatorname{concat}_g \; \sum_{k=1}^{K} \; m_{gk}(p) \;
x_g\big(p + s\,(p_k + \Delta p_{gk}(p))\big)
$$

| term | what it is | step |
|---|---|---|
| $x$ | the input, channels last; $x_g$ are its channels of group $g$ | 1 |
| | the layers from which offsets and mask are computed | 2 |
| | the gate that blends $y$ with $x$, in the largest models | 3 |
| $p$ | reference points: where each output pixel is in the input | 4 |
| $p_k$ | the regular kernel grid, with its dilation | 5 |
| $p + s\,(p_k + \Delta p_{gk})$ | sampling locations: the grid moved by the learned offsets | 6 |
| $x_g(\dots)$ | bilinear sampling between pixels | 7 |
| $m_{gk}$ and $\sum_k$ | the mask and the weighted sum | 8 |
| | all of it as the module of InternImage | 9 |

A new model has offsets of zero, so nothing would be seen to move. We take `digits_internimage`, a
small InternImage that was trained on handwritten digits and whose weights are in this folder.
"""

# %%
import time
from pathlib import Path

import digits
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dcnv3_tvm as dt
from dcnv3_tvm import frontend
from dcnv3_tvm.pytorch import DCNv3
from dcnv3_tvm.verify.random_weights import randomize_

# The size of the last step. Reduce it on a small machine: this one needs 3 GB of memory.
SHAPE = (10, 256, 256, 64)


# %% [markdown]
r"""
Two small helpers: one compares a result with the library's and stops where they differ, one
prepares a picture. A pixel of the feature map is four pixels of the image wide, because the stem
of the model halves the image twice; pixel $i$ of the map is above pixel $4i$ of the image.
Pictures use the coordinates of the map: x to the right, y down.
"""


# %%
def check(what: str, ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Compare with the library: largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{what}: {tuple(ours.shape)}, relative difference {difference:.0e}")
    assert difference < tolerance


def draw_image(axes: plt.Axes, title: str) -> None:
    """Draw the image in coordinates of the feature map."""
    size = len(canvas) / 4
    axes.imshow(
        canvas, cmap="gray_r", alpha=0.5, extent=(-1 / 8, size - 1 / 8, size - 1 / 8, -1 / 8)
    )
    axes.set_title(title)


# %% [markdown]
r"""
The image is four cluttered digits, 64x64 pixels. Its feature map after the stem and the first norm
is what the first DCNv3 module of the model gets: 16x16 pixels with 16 channels, in 2 groups of 8.
"""

# %%
weights = Path(digits.__file__).with_name("digits_internimage.safetensors")
model = frontend.create_model("digits_internimage", checkpoint=weights)
_, held_out = digits.load()
drawn = digits.draw(held_out.images[[0, 1, 3, 5]], Generator().manual_seed(8))
rows = [torch.cat([drawn[i], drawn[i + 1]], -1) for i in (0, 2)]
image = digits.normalise(torch.cat(rows, -2)[None])
canvas = torch.cat(rows, -2)[0].numpy()

block = model.levels[0].blocks[0]
module = block.dcn
features = block.norm1(model.patch_embed(image))
G, K = module.group, 9
N, H, W, C = features.shape
print(
    f"image {tuple(image.shape)} -> features {tuple(features.shape)}:",
    f"{G} groups of {C // G} channels",
)


# %% [markdown]
r"""
## 1. Channels first, channels last

PyTorch's convolutions take (N, C, H, W); DCNv3 takes (N, H, W, C), so that the channels of a
pixel, which are sampled together, are neighbours in memory. Two helpers go from one to the other.
They only rename axes: nothing is copied.

The last axis of each tensor is a product of indices, in this order:

| tensor | shape | last axis |
|---|---|---|
| $x$ | (N, H, W, C) | channel $= g \cdot C/G + c$ |
| offset $\Delta p$ | (N, Ho, Wo, G·K·2) | $(g \cdot K + k) \cdot 2 + \{0: x,\ 1: y\}$, in pixels |
| mask $m$ | (N, Ho, Wo, G·K) | $g \cdot K + k$ |

**In the equation:** $x$, and how $\Delta p_{gk}(p)$ is stored.
"""


# %%
def to_channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


# What the trained layers compute; step 2 takes this line apart.
local = module.dw_conv(to_channels_first(features))
offset, logits = module.offset(local), module.mask(local)
x = module.input_proj(features)
print(f"x {tuple(x.shape)}, offset {tuple(offset.shape)}, mask logits {tuple(logits.shape)}")

maps = to_channels_first(offset)[0]
g, k = 0, 4  # the middle point of the kernel in group 0
channel = (g * K + k) * 2
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for plot, name, values in zip(axes[:2], ("Δx", "Δy"), maps[channel : channel + 2], strict=True):
    drawn = plot.imshow(values, cmap="RdBu_r", vmin=-2, vmax=2)
    plot.set_title(f"channel {channel + 'xy'.index(name[1])}: {name} of point 4")
figure.colorbar(drawn, ax=axes[:2], shrink=0.7, label="pixels")
draw_image(axes[2], "both as arrows (group 0, point 4)")
columns, lines = np.meshgrid(np.arange(W), np.arange(H))
axes[2].quiver(
    columns,
    lines,
    *maps[channel : channel + 2],
    color="C3",
    angles="xy",
    scale_units="xy",
    scale=1,
    width=0.006,
)
plt.show()

# %% [markdown]
r"""
The check: with a 1x1 kernel, offsets of zero and a mask of one, DCNv3 copies its input. So it
returns what we gave it if, and only if, we gave it channels last. Channels first raise an error,
because here the shape tells; a square tensor whose sizes happen to fit would give nonsense.
"""

# %%
nchw = torch.randn(2, 6, 5, 9)
nhwc = to_channels_last(nchw).contiguous()
assert torch.equal(to_channels_first(to_channels_last(nchw)), nchw)
copy = dt.dcnv3(
    nhwc, torch.zeros(2, 5, 9, 2), torch.ones(2, 5, 9, 1), group=1, kernel_size=1, pad=0
)
check("copied by a 1x1 kernel", nhwc, copy)
try:
    dt.dcnv3(nchw, torch.zeros(2, 5, 9, 2 * 2 * 9), torch.ones(2, 5, 9, 2 * 9), group=2)
except dt.DCNv3Error as error:
    print(f"\nNCHW: {error}")
else:
    raise AssertionError("NCHW was accepted")

# %% [markdown]
r"""
## 2. Norm and activation

Offsets and mask come from the features around each pixel:

1. a depthwise 3x3 convolution looks at the neighbours, each channel for itself (channels first);
2. LayerNorm brings the channels of each pixel to mean 0 and variance 1 (channels last,
   $\varepsilon = 10^{-6}$);
3. GELU, the exact one with the error function: $\operatorname{GELU}(z) = \tfrac12 z\,(1 +
   \operatorname{erf}(z/\sqrt2))$;
4. two linear layers give $2GK$ offsets and $GK$ logits of the mask.

The published code builds 2 and 3 with `build_norm_layer` and `build_act_layer`. The offsets depend
on the input of the *module*, not on the projected $x$, which is what they sample.

**In the equation:** the $(p)$ of $\Delta p_{gk}(p)$ and $m_{gk}(p)$: both are functions of the
input around $p$.
"""


# %%
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


depthwise, norm, _ = module.dw_conv  # the norm turns its input to channels last first
convolved = to_channels_last(
    F.conv2d(to_channels_first(features), depthwise.weight, depthwise.bias, padding=1, groups=C)
)
normed = layer_norm(convolved, norm[1].weight, norm[1].bias)
activated = gelu(normed)

# (N, H, W, G*K*2) -> (N, H, W, G, K, 2); the length of an offset is that of the pair (x, y).
lengths = module.offset(activated).unflatten(-1, (G, K, 2)).norm(dim=-1)
steps = {
    "depthwise convolution": convolved[0, ..., 2],
    "LayerNorm": normed[0, ..., 2],
    "GELU": activated[0, ..., 2],
    "mean length of the offsets": lengths[0].mean((-1, -2)),
}
figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
for plot, (title, values) in zip(axes, steps.items(), strict=True):
    figure.colorbar(
        plot.imshow(values, cmap="magma" if "length" in title else "viridis"), ax=plot, shrink=0.7
    )
    plot.set_title(title if "length" in title else f"{title}, channel 2")
plt.show()

check("norm and activation", activated, local)
check("offsets", F.linear(activated, module.offset.weight, module.offset.bias), offset)

# %% [markdown]
r"""
The offsets are longest along the strokes, most of all at their left: there the model looks
furthest.

## 3. Center feature scale

H and G, the largest models, blend the result of each group with what was there before, by a gate:

$$
s_g(p) = \sigma\big(w_g \cdot \text{local}(p) + b_g\big), \qquad
y_g(p) \leftarrow (1 - s_g(p))\; y_g(p) + s_g(p)\; x_g(p)
$$

It keeps a pixel's own feature where looking elsewhere does not help. The gate has one value for
each group and pixel, repeated over the channels of the group. T to XL, and the model for digits,
have none; so we draw weights for one, and take $y$ from the library. The steps after this one take
$y$ apart.

**In the equation:** nothing: neither the paper's nor the article's has it.
"""


# %%
def blend(y: Tensor, x: Tensor, local: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gate = torch.sigmoid(local @ weight.T + bias)  # (N, H, W, G)
    gate = gate.repeat_interleave(y.shape[-1] // gate.shape[-1], dim=-1)  # (N, H, W, C)
    return (1 - gate) * y + gate * x


gated = DCNv3(C, group=G, center_feature_scale=True).requires_grad_(False)
gated.load_state_dict(module.state_dict(), strict=False)  # the trained offsets
gate_weight = gated.center_feature_scale_proj_weight.normal_(generator=Generator().manual_seed(0))
gate_bias = gated.center_feature_scale_proj_bias.fill_(0.5)

y = dt.dcnv3(x, offset, logits, group=G, softmax=True)
blended = blend(y, x, local, gate_weight, gate_bias)
print(f"gate {tuple(torch.Size([*local.shape[:3], G]))} -> blended {tuple(blended.shape)}")

gate = torch.sigmoid(local @ gate_weight.T + gate_bias)[0]
figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
panels = {
    "y, deformed": (y[0, ..., 3], "viridis"),
    "x, in place": (x[0, ..., 3], "viridis"),
    "gate of group 0": (gate[..., 0], "gray"),
    "blended": (blended[0, ..., 3], "viridis"),
}
for plot, (title, (values, colours)) in zip(axes, panels.items(), strict=True):
    drawn = plot.imshow(values, cmap=colours, vmin=0 if colours == "gray" else None)
    figure.colorbar(drawn, ax=plot, shrink=0.7)
    plot.set_title(title)
plt.show()

check("module with a gate", module.output_proj(blended), gated(features))

# %% [markdown]
r"""
## 4. Reference points

Output pixel (row $i$, column $j$) looks around one point of the input, its reference point. As in
a convolution of stride $t$, padding $a$, dilation $d$ and kernel size $n$, it is in the middle of
the kernel:

$$
p_x = j\,t + h - a, \qquad p_y = i\,t + h - a, \qquad h = \lfloor d\,(n - 1) / 2 \rfloor
$$

For the modules of InternImage ($t = a = d = 1$, $n = 3$) that is the pixel itself. Padding moves
the reference points and nothing else: nothing is padded, and what is outside of the input reads as
zero. The points have the shape (1, Ho, Wo, 1, 2), x before y: the same for each image and group.

**In the equation:** $p$.
"""


# %%
def output_size(size: int, n: int, t: int, a: int, d: int) -> int:
    return (size + 2 * a - (d * (n - 1) + 1)) // t + 1


def reference_points(
    height: int, width: int, n: int = 3, t: int = 1, a: int = 1, d: int = 1
) -> Tensor:
    half = d * (n - 1) // 2
    y = torch.arange(output_size(height, n, t, a, d)) * t + half - a
    x = torch.arange(output_size(width, n, t, a, d)) * t + half - a
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None, :, :, None].float()


reference = reference_points(H, W)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
deformed = reference + offset.unflatten(-1, (G, K, 2))[:, :, :, 0, 4:5]
panels = {
    "stride 1, padding 1": reference,
    "stride 2, padding 1": reference_points(H, W, t=2),
    "stride 2, no padding, dilation 2": reference_points(H, W, t=2, a=0, d=2),
}
for plot, (title, points) in zip(axes, panels.items(), strict=True):
    draw_image(plot, f"{title}: {tuple(points.shape)}")
    plot.scatter(*points.flatten(0, 3).T, s=14, color="C0", label="reference points")
axes[0].scatter(*deformed.flatten(0, 3).T, s=5, color="C3", label="moved by Δp of group 0, point 4")
axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08))
plt.show()

# %% [markdown]
r"""
How can `dt.dcnv3` tell us where it looks? We give it an input that holds the coordinates: channel
0 of each group is the column of the pixel, channel 1 the row. Bilinear sampling of a ramp gives
the position itself. With a mask that is one at point $k$ and zero at the others, the result is the
position of point $k$. (At positions outside of the input the ramp ends; there we cannot compare.)
"""


# %%
def ask_where(offset: Tensor, height: int, width: int, **parameters: float) -> Tensor:
    """Return where dt.dcnv3 samples each point: (N, Ho, Wo, G, K, 2)."""
    ramp = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)
    ramp = ramp.float().repeat(len(offset), 1, 1, G)  # (N, H, W, G*2)
    count = offset.shape[-1] // (2 * G)
    asked = []
    for k in range(count):
        only = torch.zeros(*offset.shape[:3], G, count)
        only[..., k] = 1
        y = dt.dcnv3(ramp, offset, only.flatten(-2), group=G, **parameters)
        asked.append(y.unflatten(-1, (G, 2)))
    return torch.stack(asked, -2)


# Offsets that move every point of the 3x3 grid into its middle, point 4.
grid = torch.tensor([(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)])
for stride in (1, 2):
    points = reference_points(H, W, t=stride)
    to_middle = -grid.float().flatten().repeat(1, *points.shape[1:3], G)
    asked = ask_where(to_middle, H, W, stride=stride)
    check(f"reference points, stride {stride}", points[..., None, :].expand_as(asked), asked)

# %% [markdown]
r"""
## 5. Dilation grid

Around its reference point a kernel has $K$ points, $d$ pixels apart. DCNv3 numbers them **column
by column**: $k = \text{column} \cdot n + \text{row}$. (PyTorch's convolutions, and DCNv1 and v2,
number them row by row. Whoever moves weights or offsets from there has to transpose.) With
`remove_center` the middle point is left out, and the numbers after it decrease by one. The grid
has the shape (1, 1, 1, G·K, 2), here (1, 1, 1, 1, K, 2) for all groups.

**In the equation:** $p_k$.
"""


# %%
def dilation_grid(n: int = 3, d: int = 1, remove_center: bool = False) -> Tensor:
    half = d * (n - 1) // 2
    points = [
        (column * d - half, row * d - half)
        for column in range(n)
        for row in range(n)
        if not (remove_center and column == row == n // 2)
    ]
    return torch.tensor(points).float().reshape(1, 1, 1, 1, -1, 2)


ROW, COLUMN = 4, 11  # the output pixel that the pictures follow
here = reference[0, ROW, COLUMN, 0]
learned = offset.unflatten(-1, (G, K, 2))  # (N, H, W, G, K, 2)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
panels = {
    "dilation 1": dilation_grid() + 0 * learned[:, :1, :1, :1],
    "dilation 2": dilation_grid(d=2),
    "with the offsets of group 0": dilation_grid() + learned[:, ROW, COLUMN, :1, :],
}
for plot, (title, points) in zip(axes, panels.items(), strict=True):
    draw_image(plot, title)
    plot.scatter(*(points.reshape(K, 2) + here).T, s=130, color="C1", edgecolor="black")
    for k, (column, row) in enumerate(points.reshape(K, 2) + here):
        plot.text(column, row, str(k), ha="center", va="center", fontsize=8)
    plot.set(xlim=(here[0] - 3.4, here[0] + 3.4), ylim=(here[1] + 3.4, here[1] - 3.4))
plt.show()

for d in (1, 2):
    asked = ask_where(torch.zeros(1, H, W, G * K * 2), H, W, dilation=d, pad=d)
    ours = (reference_points(H, W, a=d, d=d)[..., None, :] + dilation_grid(d=d)).expand_as(asked)
    inside = slice(d, -d)
    check(f"grid of dilation {d}", ours[:, inside, inside], asked[:, inside, inside])
eight = ask_where(torch.zeros(1, H, W, G * 8 * 2), H, W, remove_center=True)[:, 1:-1, 1:-1]
ours = reference[..., None, :] + dilation_grid(remove_center=True)
check("grid without its middle", ours[:, 1:-1, 1:-1].expand_as(eight), eight)

# %% [markdown]
r"""
## 6. Sampling locations

The learned offsets move the points of the grid, each on its own, differently for each output pixel
and each group. `offset_scale` $s$ stretches the grid **and** the offsets. It is 1 for most models
and 2 for L and XL, whose regular grid therefore already has the size of a 5x5 kernel.

The locations are fractions of pixels, (N, Ho, Wo, G, K, 2); stored flat, (N, Ho, Wo, G·K·2), as
the offsets.

**In the equation:** $p + s\,(p_k + \Delta p_{gk}(p))$.
"""


# %%
def sampling_locations(reference: Tensor, grid: Tensor, offset: Tensor, scale: float) -> Tensor:
    learned = offset.unflatten(-1, (G, -1, 2))
    return reference[..., None, :] + scale * (grid + learned)


locations = sampling_locations(reference, dilation_grid(), offset, 1.0)
regular = reference[..., None, :] + dilation_grid()
print(f"{tuple(reference.shape)} + ({tuple(dilation_grid().shape)} + {tuple(learned.shape)})")
print(f"-> {tuple(locations.shape)}")

figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
draw_image(axes[0], "three output pixels (crosses) and where they look")
for row, column in ((ROW, COLUMN), (11, 4), (12, 11)):
    axes[0].plot(column, row, "kx", markersize=9)
    for g in range(G):
        axes[0].scatter(*locations[0, row, column, g].T, s=26, color=f"C{g}", edgecolor="black")
draw_image(axes[1], f"pixel ({ROW}, {COLUMN}): from the grid to the locations")
for g in range(G):
    start, end = regular[0, ROW, COLUMN, 0], locations[0, ROW, COLUMN, g]
    axes[1].quiver(
        *start.T,
        *(end - start).T,
        color=f"C{g}",
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.006,
    )
    axes[1].scatter(*end.T, s=60, color=f"C{g}", edgecolor="black", label=f"group {g}")
axes[1].scatter(*start.T, s=20, color="black", label="regular grid", zorder=3)
axes[1].set(xlim=(COLUMN - 3.4, COLUMN + 3.4), ylim=(ROW + 3.4, ROW - 3.4))
axes[1].legend()
plt.show()

for scale in (1.0, 2.0):
    ours = sampling_locations(reference, dilation_grid(), offset, scale)
    asked = ask_where(offset, H, W, offset_scale=scale)
    inside = ((ours >= 0) & (ours <= torch.tensor([W - 1, H - 1]))).all(-1)
    print(f"offset_scale {scale}: {inside.float().mean():.0%} of the locations are inside")
    check("  those", ours[inside], asked[inside])

# %% [markdown]
r"""
## 7. Bilinear sampling

A location lies between four pixels. The value there is their mean, weighted by how near each is:
with $(x, y)$ the location, pixel (row $r$, column $c$) has the weight $(1 - |x - c|)\,(1 - |y -
r|)$. Pixels outside of the input count as zero, each of the four on its own, so that the value
fades to zero within one pixel of the border.

This step makes the offsets learnable: a rounded location would have no gradient, a bilinear one
has.

**In the equation:** $x_g(\dots)$.
"""


# %%
def bilinear(x: Tensor, locations: Tensor) -> Tensor:
    """Sample x (N, H, W, C) at locations (N, Ho, Wo, G, K, 2): (N, Ho, Wo, G, K, C/G)."""
    n, height, width, _ = x.shape
    x = x.unflatten(-1, (locations.shape[3], -1))  # (N, H, W, G, C/G)
    column, row = locations.unbind(-1)
    left, top = column.floor(), row.floor()
    image_index = torch.arange(n).reshape(-1, 1, 1, 1, 1)
    group_index = torch.arange(locations.shape[3]).reshape(1, 1, 1, -1, 1)
    result = torch.zeros(*column.shape, x.shape[-1], dtype=x.dtype)
    for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - (column - c).abs()) * (1 - (row - r).abs())
        weight = weight * ((r >= 0) & (r < height) & (c >= 0) & (c < width))
        r, c = r.clamp(0, height - 1).long(), c.clamp(0, width - 1).long()
        result += weight[..., None] * x[image_index, r, c, group_index]
    return result


samples = bilinear(x, locations)
print(f"x {tuple(x.shape)} at {tuple(locations.shape)} -> {tuple(samples.shape)}")

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
column, row = (float(value) for value in locations[0, ROW, COLUMN, 0, 0])
left, top = int(column), int(row)
axes[0].imshow(x[0, ..., 3], cmap="viridis")
for r in (top, top + 1):
    for c in (left, left + 1):
        weight = (1 - abs(column - c)) * (1 - abs(row - r))
        value = f"{x[0, r, c, 3]:.2f}\nweight {weight:.2f}"
        axes[0].text(c, r, value, ha="center", va="center", color="white", fontweight="bold")
axes[0].plot(column, row, "o", color="C3", markersize=12, markeredgecolor="white")
axes[0].set(xlim=(left - 1, left + 2), ylim=(top + 2, top - 1))
axes[0].set_title(
    f"point 0 of group 0: {samples[0, ROW, COLUMN, 0, 0, 3]:.2f} at ({column:.2f}, {row:.2f})"
)
line = torch.linspace(-2, W + 1, 400)
along = torch.stack([line, torch.full_like(line, 4.0)], -1)[None, None, :, None, None]
axes[1].plot(line, bilinear(x[..., 3:4], along)[0, 0, :, 0, 0, 0], label="value at any location")
axes[1].plot(range(W), x[0, 4, :, 3], "o", label="pixels")
axes[1].axvspan(-1, 0, color="gray", alpha=0.2)
axes[1].axvspan(W - 1, W, color="gray", alpha=0.2, label="the border fades")
axes[1].set(title="row 4 of channel 3", xlabel="x")
axes[1].legend()
plt.show()

# %% [markdown]
r"""
The check asks `dt.dcnv3` for one point at a time, as before. PyTorch's `grid_sample`, which the
article and the published PyTorch code use, samples in the same way, once the locations are
converted to its coordinates: they go from $-1$ to $1$ over the *edges* of the image, not over the
middles of the first and last pixel, hence the half pixel in $2\,(p_x + \tfrac12) / W - 1$. The
shapes are the article's: (N·G, C/G, Ho·Wo, K).
"""

# %%
for k in range(K):
    only = torch.zeros(N, H, W, G, K)
    only[..., k] = 1
    asked = dt.dcnv3(x, offset, only.flatten(-2), group=G)
    check(f"samples of point {k}", samples[..., k, :].flatten(-2), asked)

by_group = x.unflatten(-1, (G, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # (N*G, C/G, H, W)
normalised = 2 * (locations + 0.5) / torch.tensor([W, H]) - 1
normalised = normalised.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(1, 2)  # (N*G, Ho*Wo, K, 2)
sampled = F.grid_sample(by_group, normalised, align_corners=False)
print(
    f"grid_sample: {tuple(by_group.shape)} at {tuple(normalised.shape)} -> {tuple(sampled.shape)}"
)
ours = samples.permute(0, 3, 5, 1, 2, 4).flatten(0, 1).flatten(2, 3)
check("grid_sample", ours, sampled)

# %% [markdown]
r"""
## 8. Mask and sum

The mask says how much each point counts. Its logits become weights by a softmax over the $K$
points, for each group on its own:

$$
m_{gk}(p) = \frac{\exp a_{gk}(p)}{\sum_{l=1}^{K} \exp a_{gl}(p)}
$$

So the weights of a group are positive and sum to 1: each group takes a weighted mean of $K$
places. DCNv2 used a sigmoid, whose sum is anything between 0 and $K$.

There are no other weights in the operator: the mask is the kernel, and it is different at each
pixel. Channels are mixed only by the projections before and after. The groups are
**concatenated**: group $g$ fills its own channels of $y$.

**In the equation:** $m_{gk}(p)$, $\sum_k$ and $\operatorname{concat}_g$.
"""


# %%
def mask_and_sum(samples: Tensor, logits: Tensor) -> Tensor:
    mask = logits.unflatten(-1, samples.shape[3:5]).softmax(-1)  # (N, Ho, Wo, G, K)
    return (mask[..., None] * samples).sum(-2).flatten(-2)


mask = logits.unflatten(-1, (G, K)).softmax(-1)
y = mask_and_sum(samples, logits)
print(f"samples {tuple(samples.shape)}, mask {tuple(mask.shape)} -> y {tuple(y.shape)}")

figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
for g in range(G):
    draw_image(axes[g], f"group {g}, area: its mask")
    axes[g].plot(COLUMN, ROW, "kx", markersize=9)
    points, weights = locations[0, ROW, COLUMN, g], mask[0, ROW, COLUMN, g]
    axes[g].scatter(*points.T, s=900 * weights, color=f"C{g}", edgecolor="black", alpha=0.7)
    axes[g].set(xlim=(COLUMN - 3.4, COLUMN + 3.4), ylim=(ROW + 3.4, ROW - 3.4))
for plot, (title, values) in zip(
    axes[2:], {"x, channel 3": x, "y, channel 3": y}.items(), strict=True
):
    figure.colorbar(plot.imshow(values[0, ..., 3]), ax=plot, shrink=0.6)
    plot.set_title(title)
plt.show()

check("dt.dcnv3 with our mask", y, dt.dcnv3(x, offset, mask.flatten(-2), group=G))
check("dt.dcnv3 with logits", y, dt.dcnv3(x, offset, logits, group=G, softmax=True))

# %% [markdown]
r"""
## 9. The module

The steps in a row, with a projection before and one after, both with a bias:

$$
\operatorname{DCNv3}(\text{input}) = W_\text{out} \cdot y + b_\text{out}, \qquad
x = W_\text{in} \cdot \text{input} + b_\text{in}
$$

No norm comes between the sum and $W_\text{out}$.
"""


# %%
def dcnv3_module(module: DCNv3, features: Tensor) -> Tensor:
    group, scale = module.params.group, module.params.offset_scale
    depthwise, norm, _ = module.dw_conv
    channels = features.shape[-1]
    x = module.input_proj(features)
    convolved = F.conv2d(
        to_channels_first(features), depthwise.weight, depthwise.bias, padding=1, groups=channels
    )
    local = gelu(layer_norm(to_channels_last(convolved), norm[1].weight, norm[1].bias))
    offset = module.offset(local).unflatten(-1, (group, K, 2))
    reference = reference_points(*features.shape[1:3])
    locations = reference[..., None, :] + scale * (dilation_grid() + offset)
    return module.output_proj(mask_and_sum(bilinear(x, locations), module.mask(local)))


check("the trained module", dcnv3_module(module, features), module(features))

# %% [markdown]
r"""
Now the size of the article's example, (10, 256, 256, 64) in 4 groups: the weights of a new module,
with random offsets of about two pixels instead of zero.
"""

# %%
large = randomize_(DCNv3(SHAPE[-1], group=4), seed=0, offset_std=2).requires_grad_(False)
inputs = torch.randn(SHAPE, generator=Generator().manual_seed(0))
large(inputs[:1])  # compiles the kernel, or takes it from the cache
start = time.perf_counter()
outputs = large(inputs)
seconds = time.perf_counter() - start

spec = dt.DCNv3Spec.of(SHAPE, group=4)
for name, shape in {
    "x": spec.input_shape,
    "offset": spec.offset_shape,
    "mask": spec.mask_shape,
    "y": spec.output_shape,
}.items():
    print(f"{name:6} {shape!s:20} {np.prod(shape) * 4 / 1e6:4.0f} MB")
print(f"the operator's arithmetic: {spec.flops / 1e9:.1f} GFLOP")
print(f"the module, in {torch.get_num_threads()} threads: {seconds:.2f} s")

# Our functions keep every sample, nine times the input. One image of the batch is enough.
last = inputs[-1:]
local = large.dw_conv(to_channels_first(last))
offset = large.offset(local).unflatten(-1, (4, K, 2))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
axes[0].hist(offset.norm(dim=-1).flatten(), bins=80, color="C0")
axes[0].set(title="length of the offsets", xlabel="pixels", yticks=[])
row, column = SHAPE[1] // 2, SHAPE[2] // 2
middle = torch.tensor([column, row]) + dilation_grid()[0, 0, 0] + offset[0, row, column]
axes[1].plot(column, row, "kx", markersize=9)
for g in range(4):
    axes[1].scatter(*middle[g].T, s=50, label=f"group {g}")
axes[1].set(title="where the middle pixel looks")
axes[1].invert_yaxis()
axes[1].legend()
plt.show()

check("one image of the batch", dcnv3_module(large, last), outputs[-1:], tolerance=1e-4)

# %% [markdown]
r"""
The tolerance is larger here: at positions up to 256, float32 has steps of $2^{-16}$ of a pixel,
and our functions compute positions from the corner of the image. The library computes them
relative to the output pixel, where they are small.

The [three equations](../docs/equation.md) have the paper's, the article's and this one side by
side. The [encoder](encoder_step_by_step.ipynb), which is made of this module, is the next
notebook.
"""
