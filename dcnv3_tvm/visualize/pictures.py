"""Pictures of how a model samples, drawn with matplotlib."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from dcnv3_tvm import checks
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.plotting import new_figure, save_figure
from dcnv3_tvm.visualize.block_sampling import BlockSampling, typical_block
from dcnv3_tvm.visualize.receptive_fields import receptive_field

Photo = npt.NDArray[np.uint8]
_Place: TypeAlias = tuple[tuple[float, float], tuple[float, float]]

_PANEL: Final = 2.1
"""Width of a panel, in inches."""

_COLOURS: Final = "viridis"
"""Its lightness grows evenly, also for colour-blind readers."""

_POSITION: Final = "#d1006c"
_ARROWS: Final = "#f0a800"
_BARS: Final = "#31688e"
_MARGIN: Final = 0.1
"""Around the photo, for points outside of it, as a part of its larger side."""

_LARGEST_MARGIN: Final = 0.2

_SMALL: Final = 96
"""Photos up to this size are shown with their pixels."""

_MOST_PANELS: Final = 16
_MOST_ARROWS: Final = 24
"""Arrows along a side of the photo."""

_MOST_MAGNIFIED: Final = 4.0
"""How many times as long as the displacement an arrow may be."""


@dataclasses.dataclass(frozen=True)
class _View:
    """What a picture shows; as the arguments of `draw_picture`."""

    blocks: Sequence[BlockSampling]
    photo: Photo
    at: tuple[float, float]
    index: int | None
    group: int | None


def draw_picture(
    kind: str,
    blocks: Sequence[BlockSampling],
    photo: Photo,
    *,
    at: tuple[float, float] | None = None,
    index: int | None = None,
    group: int | None = None,
) -> Any:
    """Draw one kind of picture.

    =============== ==============================================================================
    kind            shows
    =============== ==============================================================================
    ``"points"``    sampling points of the position nearest to `at`, one panel for each stage
    ``"field"``     receptive field of that position: its points, and their pixels on the input of
                    each stage up to its own
    ``"length"``    mean offset length of each position, one panel for each stage
    ``"arrows"``    mean displacement of each position, one panel for each stage
    ``"groups"``    sampling points of each group of one block, one panel for each group
    ``"histogram"`` how often offsets have which length, by stage
    =============== ==============================================================================

    Parameters
    ----------
    kind : str
        One of the above.
    blocks : sequence of BlockSampling
        From `capture_sampling`.
    photo : numpy.ndarray
        The image that the model saw, (H, W, 3), uint8, as from `photo_of`.
    at : (float, float), optional
        Pixel (y, x) of the image; by default that in the middle.
    index : int, optional
        A block in `blocks`. By default the last block of each stage where there is a panel for
        each, and the deepest with four positions along each side for ``"field"`` and ``"groups"``.
    group : int, optional
        Show only this group; by default all.

    Returns
    -------
    matplotlib.figure.Figure
        `save_picture` writes it to a file.

    Raises
    ------
    InvalidArgumentError
        If the kind is unknown, or there is no such block or group.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if kind not in PICTURES:
        raise InvalidArgumentError(
            "there is no such picture", got=repr(kind), allowed=", ".join(PICTURES)
        )
    if at is None:
        at = (photo.shape[0] - 1) / 2, (photo.shape[1] - 1) / 2
    if index is not None:
        index = checks.integer("index", index, low=0, high=len(blocks) - 1)
    groups = min(block.params.group for block in blocks)
    if index is not None:
        groups = blocks[index].params.group
    if group is not None:
        group = checks.integer("group", group, low=0, high=groups - 1)
    return _DRAW[kind](_View(blocks, photo, at, index, group))


def save_picture(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a picture to a file, whose suffix is the format: ``.png`` or ``.svg``.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be written; an existing one is unchanged then.
    """
    save_figure(figure, path, dpi=110, bbox_inches="tight", pad_inches=0.06)


def _figure(rows: int, columns: int, *, height: float, width: float = _PANEL) -> tuple[Any, Any]:
    """Return a figure and its panels, as an array of (rows, columns)."""
    figure = new_figure(
        (width * columns, height * rows + 0.35),
        extra="visualize",
        instead="The page (.html) does without.",
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _photo_figure(photo: Photo, count: int, *, columns: int = 4, extra: float = 0.3) -> Any:
    """Return a figure and `count` panels in the shape of the photo."""
    columns = min(columns, count)
    rows = -(-count // columns)
    ratio = min(photo.shape[0] / photo.shape[1], 2.0)
    figure, panels = _figure(rows, columns, height=_PANEL * ratio + extra)
    for panel in panels.flat[count:]:
        panel.set_axis_off()
    return figure, panels.flat[:count]


def _show(panel: Any, photo: Photo, *, dim: bool = False, margin: float = 0.0) -> None:
    height, width, _ = photo.shape
    shown = photo
    if dim:
        grey = 0.55 * photo.astype(np.float64) @ (0.299, 0.587, 0.114)
        shown = np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)
    pixelated = max(height, width) <= _SMALL
    panel.imshow(shown, interpolation="nearest" if pixelated else "antialiased")
    space = margin * max(height, width)
    panel.set_xlim(-0.5 - space, width - 0.5 + space)
    panel.set_ylim(height - 0.5 + space, -0.5 - space)
    panel.set_facecolor("#e9ebee")
    panel.set_xticks([])
    panel.set_yticks([])
    for side in panel.spines.values():
        side.set_visible(False)


def _margin(photo: Photo, points: Sequence[Any]) -> float:
    """Return the margin in which the points lie, within bounds, as a part of the larger side."""
    side = max(photo.shape[0], photo.shape[1])
    places = np.concatenate(points)
    places = places[np.isfinite(places).all(axis=-1)]
    limits = np.array([photo.shape[1], photo.shape[0]]) - 1
    beyond = float(np.maximum(-places, places - limits).max(initial=0))
    return min(max(beyond / float(side) + 0.04, _MARGIN), _LARGEST_MARGIN)


def _title(block: BlockSampling) -> str:
    height, width = block.output_size
    return f"stage {block.stage}, block {block.block}\n{height} x {width} positions"


def _chosen(blocks: Sequence[BlockSampling], index: int | None) -> list[BlockSampling]:
    """Return the block that was asked for, or the last of each stage."""
    if index is not None:
        return [blocks[index]]
    return list({block.stage: block for block in blocks}.values())


def _cross(panel: Any, y: float, x: float) -> None:
    for colour, width, size in (("white", 4.5, 13), (_POSITION, 2.0, 12)):
        panel.plot([x], [y], "+", color=colour, markersize=size, markeredgewidth=width, zorder=5)


def _scatter(panel: Any, points: Any, weights: Any, most: float | None = None) -> Any:
    """Draw points with area and colour by weight, the heaviest first."""
    weights = np.abs(np.nan_to_num(weights))
    order = np.argsort(-weights)
    most = (weights.max() if most is None else most) or 1.0
    size = 220 / np.sqrt(len(weights))
    return panel.scatter(
        points[order, 0],
        points[order, 1],
        s=size * (0.12 + weights[order] / most),
        c=weights[order],
        cmap=_COLOURS,
        vmin=0,
        vmax=most,
        edgecolors="white",
        linewidths=0.7,
        zorder=4,
    )


def _at_position(
    block: BlockSampling, at: tuple[float, float], group: int | None
) -> tuple[tuple[float, float], Any, Any]:
    """Return position, points and weights of one position, in pixels of the image."""
    y, x = block.nearest_position(*at)
    groups = _groups(group)
    points = block.points_in_image[y, x, groups].reshape(-1, 2)
    return block.position_in_image(y, x), points, block.weights[y, x, groups].reshape(-1)


def _groups(group: int | None) -> slice:
    """Return the one group that was asked for, or all."""
    return slice(None) if group is None else slice(group, group + 1)


def _finite(values: Any) -> Any:
    """Replace what is no number, where the operator samples zeros, by no displacement."""
    return np.where(np.isfinite(values), values, 0)


def _colour_bar(
    figure: Any, panel: Any, drawn: Any, label: str, *, ticks: Sequence[float] | None = None
) -> None:
    bar = figure.colorbar(drawn, ax=panel, orientation="horizontal", pad=0.03, aspect=30)
    bar.set_label(label, fontsize="small")
    bar.ax.tick_params(labelsize="small")
    if ticks is None:
        bar.ax.locator_params(nbins=4)
    else:
        bar.set_ticks(ticks, labels=[f"{value:.2g}" for value in ticks])


def _draw_points(view: _View) -> Any:
    blocks, photo, at, index, group = view.blocks, view.photo, view.at, view.index, view.group
    chosen = _chosen(blocks, index)
    figure, panels = _photo_figure(photo, len(chosen), extra=0.75)
    found = [_at_position(block, at, group) for block in chosen]
    margin = _margin(photo, [points for _, points, _ in found])
    for panel, block, (position, points, weights) in zip(panels, chosen, found, strict=True):
        _show(panel, photo, margin=margin)
        drawn = _scatter(panel, points, weights)
        _cross(panel, *position)
        panel.set_title(_title(block), fontsize="medium")
        _colour_bar(figure, panel, drawn, "weight of a point")
    return figure


def _draw_field(view: _View) -> Any:
    blocks, photo, at, index, group = view.blocks, view.photo, view.at, view.index, view.group
    from matplotlib.colors import PowerNorm

    index = typical_block(blocks) if index is None else index
    start = blocks[index]
    y, x = start.nearest_position(*at)
    fields = receptive_field(blocks, index, y, x, group=group)
    # On the input of the first block of each stage, the deepest first.
    first = list({field.block.stage: field for field in fields}.values())
    figure, panels = _photo_figure(photo, 1 + len(first), columns=5, extra=0.5)
    position, points, weights = _at_position(start, at, group)
    _show(panels[0], photo)
    drawn = _scatter(panels[0], points, weights)
    _cross(panels[0], *position)
    panels[0].set_title("sampling points", fontsize="medium")
    _colour_bar(figure, panels[0], drawn, "weight of a point")
    for panel, field in zip(panels[1:], first, strict=True):
        _show(panel, photo, dim=True)
        share = np.nan_to_num(100 * field.contribution.clip(0))
        most = float(share.max()) or 1.0
        norm = PowerNorm(0.5, vmin=0, vmax=most)
        place = field.block.origin, field.block.stride
        drawn = _heat(panel, place, share, norm, alpha=np.sqrt(share / most))
        _cross(panel, *position)
        panel.set_title(f"input of stage {field.block.stage}", fontsize="medium")
        _colour_bar(figure, panel, drawn, "% of the weight", ticks=(0, most / 4, most))
    figure.suptitle(
        f"Receptive field of one position of stage {start.stage}, block {start.block}",
        fontsize="medium",
    )
    return figure


def _heat(panel: Any, place: _Place, values: Any, norm: Any, alpha: Any) -> Any:
    """Draw a map over the photo: its pixel i has its centre on pixel origin + i*stride."""
    limits = panel.get_xlim(), panel.get_ylim()
    (top, bottom), (left, right) = (
        (origin - 0.5 * stride, origin + (size - 0.5) * stride)
        for origin, stride, size in zip(*place, values.shape, strict=True)
    )
    extent = (left, right, bottom, top)
    options = {"extent": extent, "interpolation": "nearest", "cmap": _COLOURS, "norm": norm}
    panel.imshow(values, alpha=0.15 + 0.85 * np.minimum(1, 1.4 * alpha), **options)
    drawn = panel.imshow(values, visible=False, **options)  # for an opaque colour bar
    panel.set_xlim(limits[0])
    panel.set_ylim(limits[1])
    return drawn


def _draw_length(view: _View) -> Any:
    blocks, photo, index, group = view.blocks, view.photo, view.index, view.group
    from matplotlib.colors import Normalize

    chosen = _chosen(blocks, index)
    figure, panels = _photo_figure(photo, len(chosen), extra=0.75)
    for panel, block in zip(panels, chosen, strict=True):
        mean = _finite(block.offset_length[:, :, _groups(group)]).mean(axis=(2, 3))
        most = float(mean.max()) or 1.0
        _show(panel, photo, dim=True)
        place = block.output_origin, block.output_stride
        drawn = _heat(panel, place, mean, Normalize(0, most), alpha=mean / most)
        panel.set_title(_title(block), fontsize="medium")
        _colour_bar(figure, panel, drawn, "mean length (pixels)")
    return figure


def _draw_arrows(view: _View) -> Any:
    blocks, photo, index, group = view.blocks, view.photo, view.index, view.group
    chosen = _chosen(blocks, index)
    figure, panels = _photo_figure(photo, len(chosen))
    for panel, block in zip(panels, chosen, strict=True):
        groups = _groups(group)
        weights = np.nan_to_num(block.weights[:, :, groups, :, None])
        shift = (_finite(block.displacement[:, :, groups]) * weights).sum(axis=(2, 3))
        shift *= np.array(block.stride[::-1]) / np.maximum(weights.sum(axis=(2, 3)), 1e-12)
        step = -(-max(block.output_size) // _MOST_ARROWS)
        longest = float(np.linalg.norm(shift[::step, ::step], axis=-1).max()) or 1.0
        factor = min(1.5 * step * max(block.output_stride) / longest, _MOST_MAGNIFIED)
        rows, columns = np.mgrid[: block.output_size[0] : step, : block.output_size[1] : step]
        _show(panel, photo, dim=True, margin=_MARGIN)
        panel.quiver(
            block.output_origin[1] + columns * block.output_stride[1],
            block.output_origin[0] + rows * block.output_stride[0],
            shift[::step, ::step, 0],
            shift[::step, ::step, 1],
            color=_ARROWS,
            width=0.009,
            minshaft=2,
            minlength=0,
            angles="xy",
            scale_units="xy",
            scale=1 / factor,
        )
        title = f"stage {block.stage}, block {block.block}\narrows {factor:.2g} times as long"
        panel.set_title(title, fontsize="medium")
    figure.suptitle("Mean displacement of the points, weighted by the mask", fontsize="medium")
    return figure


def _draw_groups(view: _View) -> Any:
    blocks, photo, at, index, group = view.blocks, view.photo, view.at, view.index, view.group
    block = blocks[typical_block(blocks) if index is None else index]
    shown = list(range(block.params.group)) if group is None else [group]
    left_out = len(shown[_MOST_PANELS:])
    shown = shown[:_MOST_PANELS]
    figure, panels = _photo_figure(photo, len(shown), extra=0.05)
    found = [_at_position(block, at, each) for each in shown]
    most = max(float(np.abs(np.nan_to_num(weights)).max()) for _, _, weights in found)
    margin = _margin(photo, [points for _, points, _ in found])
    for panel, each, (position, points, weights) in zip(panels, shown, found, strict=True):
        _show(panel, photo, margin=margin)
        drawn = _scatter(panel, points, weights, most)
        _cross(panel, *position)
        panel.set_title(f"group {each}", fontsize="medium")
    figure.colorbar(drawn, ax=list(panels), label="weight of a point", aspect=30, pad=0.02)
    note = f"; {left_out} more groups are left out" if left_out else ""
    figure.suptitle(
        f"Groups of one position of stage {block.stage}, block {block.block}{note}",
        fontsize="medium",
    )
    return figure


def _draw_histogram(view: _View) -> Any:
    blocks, index, group = view.blocks, view.index, view.group
    chosen = blocks if index is None else [blocks[index]]
    lengths: dict[int, list[Any]] = {}
    for block in chosen:
        groups = _groups(group)
        length = np.linalg.norm(block.displacement[:, :, groups], axis=-1)
        lengths.setdefault(block.stage, []).append(length.reshape(-1))
    joined = {stage: np.concatenate(parts) for stage, parts in lengths.items()}
    joined = {stage: values[np.isfinite(values)] for stage, values in joined.items()}
    every = np.concatenate(list(joined.values()))
    longest = float(np.quantile(every, 0.995)) if every.size else 0.0
    edges = np.linspace(0, max(longest, 1e-3), 41)
    figure, panels = _figure(len(joined), 1, height=1.1, width=6.4)
    for panel, (stage, values) in zip(panels[:, 0], joined.items(), strict=True):
        counts, _ = np.histogram(values, edges)
        panel.stairs(100 * counts / max(values.size, 1), edges, fill=True, color=_BARS)
        mean = values.mean() if values.size else math.nan
        label = f"stage {stage}: mean {mean:.2f}, {values.size:,} points"
        panel.set_title(label, fontsize="medium", loc="right", pad=2)
        panel.set_xlim(0, edges[-1])
        panel.locator_params(axis="y", nbins=3)
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
        panel.label_outer()
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.supxlabel("offset length, pixels of the block's input", fontsize="medium")
    figure.supylabel("% of the points", fontsize="medium")
    return figure


_DRAW: Final[dict[str, Callable[[_View], Any]]] = {
    "points": _draw_points,
    "field": _draw_field,
    "length": _draw_length,
    "arrows": _draw_arrows,
    "groups": _draw_groups,
    "histogram": _draw_histogram,
}

PICTURES: Final = tuple(_DRAW)
"""Kinds of pictures."""
