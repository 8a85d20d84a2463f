# %% [markdown]
r"""
# The encoder, step by step

InternImage is built like the convolutional networks before it, around one new operator. This
notebook builds it from small functions, in the order in which an image passes them, and compares
each with the library. Then it counts: four numbers make a model, from T with 30 million parameters
to G with 3 billion.

| part | from | to | step |
|---|---|---|---|
| stem | image (N, 3, H, W) | (N, H/4, W/4, C) | 1 |
| MLP | (N, H', W', C') | the same | 2 |
| block: DCNv3 and MLP | (N, H', W', C') | the same | 3 |
| stage: a stack of blocks | (N, H', W', C') | the same | 4 |
| downsampling, between stages | (N, H', W', C') | (N, H'/2, W'/2, 2C') | 5 |
| encoder: stem, four stages, head | image | four feature maps, logits | 6 |

What DCNv3 itself does is in [the operator, step by step](operator_step_by_step.ipynb).
"""

# %%
from pathlib import Path

import digits
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dcnv3_tvm import frontend
from dcnv3_tvm.frontend.models.config import InternImageConfig
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.parameter_count import parameter_count
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.pytorch import DCNv3
from dcnv3_tvm.verify.random_weights import randomize_

# The images of InternImage-T. Fewer or smaller ones are quicker.
IMAGES = (5, 3, 224, 224)


# %% [markdown]
r"""
Two models: InternImage-T, with random weights that make every part matter (a new model has offsets
of zero); and `digits_internimage`, a small one that was trained, whose weights are in this folder.
T shows the shapes of the published model, the trained one gives the pictures.
"""


# %%
def check(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Compare with the library: largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{what}: {tuple(ours.shape)}, relative difference {difference:.0e}")
    assert difference < 1e-4


t = randomize_(frontend.create_model("internimage_t"), seed=0)
images = torch.randn(IMAGES, generator=Generator().manual_seed(0))

weights = Path(digits.__file__).with_name("digits_internimage.safetensors")
trained = frontend.create_model("digits_internimage", checkpoint=weights)
_, held_out = digits.load()
drawn = digits.draw(held_out.images[[0, 1, 3, 5]], Generator().manual_seed(8))
rows = [torch.cat([drawn[i], drawn[i + 1]], -1) for i in (0, 2)]
picture = digits.normalise(torch.cat(rows, -2)[None])
canvas = torch.cat(rows, -2)[0].numpy()
print(f"T: {tuple(images.shape)}; the trained model: {tuple(picture.shape)}")

# %% [markdown]
r"""
## 1. Stem

Two 3x3 convolutions of stride 2, each followed by a LayerNorm over the channels, with a GELU
between them. They shrink the image to a quarter; the channels go from 3 to $C/2$ to $C$. From here
on everything is channels last.
"""


# %%
def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Normalise the channels of each pixel of (N, H, W, C)."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * norm.weight + norm.bias


def halve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve (N, C, H, W) with stride 2; return channels last."""
    return F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).permute(0, 2, 3, 1)


def stem(layers: nn.Module, image: Tensor) -> Tensor:
    x = layer_norm(halve(image, layers.conv1), layers.norm1[1])
    x = F.gelu(x).permute(0, 3, 1, 2)
    return layer_norm(halve(x, layers.conv2), layers.norm2[1])


embedded = stem(t.patch_embed, images)
check("stem", embedded, t.patch_embed(images))

small = stem(trained.patch_embed, picture)
figure, axes = plt.subplots(1, 5, figsize=(11, 2.6), layout="constrained")
axes[0].imshow(canvas, cmap="gray_r")
axes[0].set_title("image, 64x64")
for channel, plot in enumerate(axes[1:]):
    plot.imshow(small[0, ..., channel])
    plot.set_title(f"stem, channel {channel}")
plt.show()

# %% [markdown]
r"""
## 2. MLP

A linear layer to four times the channels, GELU, and one back: each pixel for itself. It mixes the
channels, which the sampling of DCNv3 keeps apart.
"""


# %%
def mlp(layers: nn.Module, x: Tensor) -> Tensor:
    hidden = F.gelu(x @ layers.fc1.weight.T + layers.fc1.bias)
    return hidden @ layers.fc2.weight.T + layers.fc2.bias


first = t.levels[0].blocks[0]
print(
    f"{first.mlp.fc1.in_features} -> {first.mlp.fc1.out_features} -> {first.mlp.fc2.out_features}"
)
check("MLP", mlp(first.mlp, embedded), first.mlp(embedded))

# %% [markdown]
r"""
## 3. Block

A block adds two updates to its input: DCNv3 looks elsewhere, the MLP mixes. The models differ in
where the norms are, because large ones do not train otherwise:

| | update of $x$ | models |
|---|---|---|
| pre-norm | $x + f(n(x))$ | T |
| post-norm, with layer scale | $x + \gamma \cdot n(f(x))$ | S, B, L, XL |
| res-post-norm | $x + r(f(n(x)))$ | H |
| post-norm | $x + n(f(x))$ | G |
| pre-norm, with layer scale | $x + \gamma \cdot f(n(x))$ | T for detection and segmentation |

$f$ is DCNv3 or the MLP, $n$ and $r$ are norms, and $\gamma$ is a learned factor for each channel,
the layer scale.
"""


# %%
def update(block: nn.Module, config: InternImageConfig, x: Tensor, part: int) -> Tensor:
    """Return what DCNv3 (part 1) or the MLP (part 2) adds to x."""
    norm = getattr(block, f"norm{part}")[0]

    def compute(x: Tensor) -> Tensor:
        return block.dcn(x) if part == 1 else mlp(block.mlp, x)

    y = layer_norm(compute(x), norm) if config.post_norm else compute(layer_norm(x, norm))
    if config.res_post_norm:
        y = layer_norm(y, getattr(block, f"res_post_norm{part}")[0])
    if config.layer_scale is not None:
        y = getattr(block, f"gamma{part}") * y
    return y


def run_block(block: nn.Module, config: InternImageConfig, x: Tensor) -> Tensor:
    x = x + update(block, config, x, 1)
    return x + update(block, config, x, 2)


check("block of T", run_block(first, t.config, embedded), first(embedded))
for kind in ("pre_norm", "pre_norm_scale", "post_norm", "post_norm_scale", "res_post_norm"):
    tiny = randomize_(frontend.create_model(f"test_internimage_{kind}"), seed=1)
    block, x = tiny.levels[0].blocks[0], torch.randn(1, 7, 9, tiny.config.channels)
    check(f"block, {kind}", run_block(block, tiny.config, x), block(x))

# %% [markdown]
r"""
What the first block of the trained model adds, and where its DCNv3 looks: the arrows are the mean
offsets of the nine points of group 0.
"""

# %%
block, config = trained.levels[0].blocks[0], trained.config
of_dcnv3 = update(block, config, small, 1)
of_mlp = update(block, config, small + of_dcnv3, 2)
local = block.dcn.dw_conv(block.norm1(small).permute(0, 3, 1, 2))
offset = block.dcn.offset(local).unflatten(-1, (block.dcn.group, 9, 2))
figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained")
panels = {
    "input, channel 3": small[0, ..., 3],
    "length of what DCNv3 adds": of_dcnv3[0].norm(dim=-1),
    "length of what the MLP adds": of_mlp[0].norm(dim=-1),
}
for plot, (title, values) in zip(axes[:3], panels.items(), strict=True):
    figure.colorbar(plot.imshow(values), ax=plot, shrink=0.7)
    plot.set_title(title)
axes[3].imshow(canvas, cmap="gray_r", alpha=0.5, extent=(-1 / 8, 16 - 1 / 8, 16 - 1 / 8, -1 / 8))
columns, rows = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="xy")
mean_x, mean_y = offset[0, :, :, 0].mean(-2).unbind(-1)
as_drawn = {"angles": "xy", "scale_units": "xy", "scale": 0.5, "width": 0.008}
axes[3].quiver(columns, rows, mean_x, mean_y, color="C3", **as_drawn)
axes[3].set_title("offsets, twice as long")
plt.show()

# %% [markdown]
r"""
## 4. Stage

A stack of blocks at one size. Models without post-norm, and H and G, end it with a norm. H and G
have further norms after every sixth block of the third stage, which keep the activations of a deep
stack in bounds.
"""


# %%
def run_stage(stage: nn.Module, config: InternImageConfig, x: Tensor) -> Tensor:
    for index, block in enumerate(stage.blocks):
        x = run_block(block, config, x)
        if index in stage.post_norm_block_ids:
            norm = stage.post_norms[stage.post_norm_block_ids.index(index)]
            x = layer_norm(x, norm[0])
    return x if stage.norm is None else layer_norm(x, stage.norm[0])


staged = run_stage(t.levels[0], t.config, embedded)
check(f"stage of {len(t.levels[0].blocks)} blocks", staged, t.levels[0](embedded))

# %% [markdown]
r"""
## 5. Downsampling

Between stages, a 3x3 convolution of stride 2 without bias and a norm: half the height and width,
twice the channels. The published code has it in the stage it ends, so its key is
`levels.0.downsample`.
"""


# %%
def downsample(layers: nn.Module, x: Tensor) -> Tensor:
    return layer_norm(halve(x.permute(0, 3, 1, 2), layers.conv), layers.norm[1])


check("downsampling", downsample(t.levels[0].downsample, staged), t.levels[0].downsample(staged))

# %% [markdown]
r"""
## 6. Encoder

All parts in a row. Detectors and segmentation take the four maps, from before each downsampling. A
classifier takes the last: a 1x1 convolution, BatchNorm, GELU, the mean over all pixels, and a
linear layer. (H and G pool by attention instead.)
"""


# %%
def encoder(model: InternImage, image: Tensor) -> list[Tensor]:
    x, maps = stem(model.patch_embed, image), []
    for stage in model.levels:
        if maps:
            x = downsample(model.levels[len(maps) - 1].downsample, maps[-1])
        maps.append(run_stage(stage, model.config, x))
    return maps


def classify(model: InternImage, last: Tensor) -> Tensor:
    return model.head(model.conv_head(last.permute(0, 3, 1, 2)).mean((2, 3)))


maps = encoder(t, images)
for index, (ours, theirs) in enumerate(zip(maps, t.forward_pyramid(images), strict=True)):
    check(f"map of stage {index + 1}", ours, theirs.permute(0, 2, 3, 1))
check("logits of one image", classify(t, maps[-1][:1]), t(images[:1]))

# %% [markdown]
r"""
The same on the trained model, and where each stage looks. The crosses mark an output pixel of each
stage, the dots its sampling points, in all groups, in coordinates of the image: a pixel of stage 4
is 32 pixels of the image wide, and its points reach as far.
"""

# %%
maps = encoder(trained, picture)
seen = []


def keep_points(module: DCNv3, inputs: tuple[Tensor], _: Tensor) -> None:
    """Keep the sampling points of the last image: (H, W, G, K, 2), relative to the pixel."""
    local = module.dw_conv(inputs[0].permute(0, 3, 1, 2))
    grid = torch.tensor([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])
    seen.append(grid + module.offset(local).unflatten(-1, (module.group, 9, 2))[0])


hooks = [stage.blocks[0].dcn.register_forward_hook(keep_points) for stage in trained.levels]
check("logits of the trained model", classify(trained, maps[-1]), trained(picture))
for hook in hooks:
    hook.remove()

figure, axes = plt.subplots(2, 4, figsize=(11, 5.4), layout="constrained")
for index, (feature_map, points) in enumerate(zip(maps, seen, strict=True)):
    stride = 4 * 2**index
    height, width, groups = points.shape[:3]
    axes[0, index].imshow(feature_map[0].norm(dim=-1))
    axes[0, index].set_title(f"stage {index + 1}: {height}x{width}x{feature_map.shape[-1]}")
    axes[1, index].imshow(canvas, cmap="gray_r", alpha=0.5)
    row, column = height // 4, 3 * width // 4 - (width > 2)
    place = torch.tensor([column, row])
    for g in range(groups):
        axes[1, index].scatter(*(stride * (place + points[row, column, g])).T, s=8)
    axes[1, index].plot(column * stride, row * stride, "kx", markersize=10)
    start, end = -1.2 * stride, 64 + 0.6 * stride
    axes[1, index].set(xlim=(start, end), ylim=(end, start))
    axes[1, index].set_title(f"{groups} groups, stride {stride}")
plt.show()

# %% [markdown]
r"""
## 7. Four numbers make a model

The paper reduces the choices to four numbers by rules of stacking:

- $C_1$, the channels of the first stage: each stage doubles them, $C_i = 2^{i-1} C_1$;
- $C'$, the channels of a group, the same everywhere: stage $i$ has $G_i = C_i / C'$ groups;
- $L_1$, the blocks of stages 1, 2 and 4; and
- $L_3 \ge L_1$, the blocks of the third stage, where most of the depth is.

Published as $(C_1, C', L_1, L_3)$:
"""

# %%
RULES = {
    "internimage_t": (64, 16, 4, 18),
    "internimage_s": (80, 16, 4, 21),
    "internimage_b": (112, 16, 4, 21),
    "internimage_l": (160, 16, 5, 22),
    "internimage_xl": (192, 16, 5, 24),
    "internimage_h": (320, 32, 6, 32),
    "internimage_g": (512, 32, 2, 48),
}

for name, (c1, group_channels, l1, l3) in RULES.items():
    channels = tuple(c1 * 2**i for i in range(4))
    groups = tuple(c // group_channels for c in channels)
    depths = (l1, l1, l3, l1)
    config = model_config(name)
    assert config.feature_channels == channels
    assert config.groups == groups
    note = ""
    if name == "internimage_g":  # the only one that breaks a rule
        assert config.depths == (2, 2, 48, 4)
        depths, note = config.depths, "  (the last stage has 4, not 2, blocks)"
    assert config.depths == depths
    print(f"{name:15} channels {channels!s:22} groups {groups!s:18} depths {depths}{note}")

# %% [markdown]
r"""
## 8. What each part costs

Parameters and multiply-adds of each part, by the shapes above. A linear layer from $a$ to $b$
channels has $(a + 1)\,b$ parameters and $a\,b$ multiply-adds for each pixel; the sampling has no
parameters, and for each pixel and channel $9 \cdot 4$ multiply-adds: four neighbours of nine
points. As usual in this field, "FLOPs" in the published tables are multiply-adds.
"""


# %%
def linear(inputs: int, outputs: int, pixels: int, bias: bool = True) -> tuple[int, int]:
    return (inputs + bias) * outputs, inputs * outputs * pixels


def count(config: InternImageConfig) -> dict[str, tuple[int, int]]:
    """Return parameters and multiply-adds by part, for one image of the model's resolution."""
    parts: dict[str, list[int]] = {}

    def add(part: str, parameters: int, multiply_adds: int = 0, times: int = 1) -> None:
        total = parts.setdefault(part, [0, 0])
        total[0] += times * parameters
        total[1] += times * multiply_adds

    side, c = config.resolution // 4, config.channels
    add("stem", *linear(9 * 3, c // 2, 4 * side**2))
    add("stem", *linear(9 * c // 2, c, side**2))
    add("norms", c + 2 * c)
    for stage, (c, g, depth) in enumerate(
        zip(config.feature_channels, config.groups, config.depths, strict=True)
    ):
        pixels = side**2
        add("input and output projections", *linear(c, c, pixels), 2 * depth)
        add("depthwise convolution", *linear(config.dw_kernel_size**2, c, pixels), depth)
        add("offsets and mask", *linear(c, 3 * 9 * g, pixels), depth)
        add("sampling", 0, 9 * 4 * c * pixels, depth)
        if config.center_feature_scale:
            add("gate", *linear(c, g, pixels), depth)
        hidden = int(c * config.mlp_ratio)
        add("MLP", *linear(c, hidden, pixels), depth)
        add("MLP", *linear(hidden, c, pixels), depth)
        add("norms", 2 * c, times=depth * (5 if config.res_post_norm else 3))
        add("norms", 2 * c if config.layer_scale is not None else 0, times=depth)
        add("norms", 2 * c if config.stage_norm else 0)
        if stage == 2:
            add("norms", 2 * c, times=len(config.level2_post_norm_block_ids))
        if stage < 3:
            side = -(-side // 2)
            add("downsampling", *linear(9 * c, 2 * c, side**2, bias=False))
            add("norms", 4 * c)
    if config.clip_projector:
        width, pooled = config.clip_channels, config.clip_output_channels
        tokens = 4 * side**2  # stage 4 is enlarged to the size of stage 3, and they are added
        add("head", *linear(c, 4 * width, side**2))
        add("head", *linear(c // 2, width, tokens))
        add("head", *linear(width, width, tokens), 2)  # keys and values
        add("head", *linear(width, width, 1))  # one query, the mean
        add("head", 0, 2 * tokens * width)  # attention
        add("head", *linear(width, pooled, 1))
        add("norms", 3 * 2 * width + 2 * pooled)
    else:
        pooled = int(c * config.head_ratio)
        add("head", *linear(c, pooled, side**2, bias=False))
        add("norms", 2 * pooled)
    add("head", *linear(pooled, config.num_classes, 1))
    return {
        part: (parameters, multiply_adds) for part, (parameters, multiply_adds) in parts.items()
    }


PUBLISHED = {  # parameters in millions, FLOPs in billions
    "internimage_t": (30, 5),
    "internimage_s": (50, 8),
    "internimage_b": (97, 16),
    "internimage_l": (223, 108),
    "internimage_xl": (335, 163),
    "internimage_h": (1080, 1478),
    "internimage_g": (3000, 2700),
}

counts = {name: count(model_config(name)) for name in RULES}
columns = list(counts["internimage_h"])
letters = {name: name.rpartition("_")[2].upper() for name in RULES}
for unit, index in (("parameters, in millions", 0), ("multiply-adds, in billions", 1)):
    print(f"{unit:30}" + "".join(f"{letter:>9}" for letter in letters.values()))
    for part in columns:
        values = (counts[name].get(part, (0, 0))[index] / 10 ** (6 + 3 * index) for name in RULES)
        print(f"{part:30}" + "".join(f"{value:9.2f}" for value in values))
    totals = [sum(values[index] for values in counts[name].values()) for name in RULES]
    print(f"{'total':30}" + "".join(f"{total / 10 ** (6 + 3 * index):9.2f}" for total in totals))
    print(f"{'published':30}" + "".join(f"{PUBLISHED[name][index]:9}" for name in RULES) + "\n")
    for name, total in zip(RULES, totals, strict=True):
        published = PUBLISHED[name][index] * 10 ** (6 + 3 * index)
        assert abs(total / published - 1) < 0.035, (name, unit)

# %% [markdown]
r"""
The published numbers are rounded. To know that ours are right, we compare them with the library's
count of parameters, exactly, and for a model with each kind of head with PyTorch's count of
operations, on tensors without memory. PyTorch does not know what is inside of our operator, so it
leaves the sampling out.
"""

# %%
for name in RULES:
    parameters = sum(values[0] for values in counts[name].values())
    assert parameters == parameter_count(model_config(name)), name
print("parameters: all equal")

for name in ("internimage_t", "test_internimage_post_norm"):
    config = model_config(name)
    with torch.device("meta"):
        model = InternImage(config).eval().requires_grad_(False)
        image = torch.empty(1, 3, config.resolution, config.resolution)
    with FlopCounterMode(display=False) as counter:
        model(image)
    theirs = counter.get_total_flops() // 2
    ours = sum(values[1] for part, values in count(config).items() if part != "sampling")
    print(f"multiply-adds of {name}: {ours:,}, PyTorch counts {theirs:,}")
    assert ours == theirs

figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
for plot, title, index in ((axes[0], "parameters", 0), (axes[1], "multiply-adds", 1)):
    left = [0.0] * len(RULES)
    for part in columns:
        share = [
            counts[name].get(part, (0, 0))[index] / sum(v[index] for v in counts[name].values())
            for name in RULES
        ]
        plot.barh(list(letters.values()), share, left=left, label=part)
        left = [a + b for a, b in zip(left, share, strict=True)]
    plot.set(title=f"share of the {title}", xlim=(0, 1))
axes[0].invert_yaxis()  # of both
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
r"""
About two thirds of the arithmetic are the MLPs; the sampling, the part that gave the network its
name, is below two percent. It is not below two percent of the *time*: it reads memory in an order
that nobody knows in advance. What [the compiler](compiler_step_by_step.ipynb) makes of it is the
next notebook.
"""
