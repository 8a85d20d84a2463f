"""Random DCNv3 problems and inputs for property-based tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.op.reference import Array
from dcnv3_tvm.spec import DCNv3Spec

# Below, at and above the vector widths; powers of two, primes and others.
_GROUP_CHANNELS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 20, 32, 37, 48, 67)
_WIDE = 1000

ONE_DRAW = settings(
    max_examples=1,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # shrinking many compilations at a time takes too long
    suppress_health_check=list(HealthCheck),
)
"""Settings of tests that draw all of their problems at once, to compile them together."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of one call, in the problem's dtype."""

    x: Array
    offset: Array
    mask: Array


@st.composite
def specs(draw: st.DrawFn, dtype: str = "float32") -> DCNv3Spec:
    """Draw static problems.

    Kernels from 1x1 to 7x7, even and non-square; strides, padding and dilations that differ by
    axis; images from 1x1, with odd sizes, and some 1000 pixels wide; many groups and channels.
    """
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    odd = kernel[0] % 2 == 1 and kernel[1] % 2 == 1 and kernel != (1, 1)
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    size = [draw(st.integers(1, 12)), draw(st.integers(1, 12))]
    wide = draw(st.integers(0, 15)) == 0
    if wide:
        size = [min(size[0], 3), _WIDE]
    pad = []
    for axis in (0, 1):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        least = max(0, -(-(extent - size[axis]) // 2))
        pad.append(least + draw(st.integers(0, 2)))
    return DCNv3Spec(
        batch=1 if wide else draw(st.integers(1, 3)),
        height=size[0],
        width=size[1],
        group=draw(st.integers(1, 2 if wide else 5)),
        group_channels=draw(st.sampled_from(_GROUP_CHANNELS[: 6 if wide else None])),
        kernel_size=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        pad=(pad[0], pad[1]),
        dilation=dilation,
        offset_scale=draw(st.sampled_from((1.0, 1.0, 2.0, 0.5, -1.25))),
        remove_center=odd and draw(st.booleans()),
        softmax=draw(st.booleans()),
        dtype=dtype,
    )


def random_inputs(spec: DCNv3Spec, seed: int = 0, spread: float = 2.0) -> Inputs:
    """Draw non-zero inputs of a static problem, with points across borders and far outside.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem.
    seed : int
        Seed of the generator.
    spread : float
        Offsets are uniform within plus or minus this many pixels, except for one in twenty, which
        is multiplied by 50.

    Returns
    -------
    Inputs
        ``x`` is normal; ``mask`` uniform in [0, 1), or in [-8, 8) with ``spec.softmax``.
    """
    rng = np.random.default_rng(seed)
    offset = rng.uniform(-spread, spread, _static(spec.offset_shape))
    offset *= np.where(rng.random(offset.shape) < 0.05, 50.0, 1.0)
    x = rng.standard_normal(_static(spec.input_shape))
    mask = rng.random(_static(spec.mask_shape))
    if spec.softmax:
        mask = 16.0 * mask - 8.0
    dtype: np.dtype[Any] = numpy_dtype(spec.dtype)
    return Inputs(x.astype(dtype), offset.astype(dtype), mask.astype(dtype))


def _static(shape: tuple[int | None, ...]) -> tuple[int, ...]:
    if None in shape:
        raise ValueError(f"the problem is symbolic: {shape}")
    return tuple(size for size in shape if size is not None)


def large_inputs() -> tuple[DCNv3Spec, Inputs]:
    """Return a float16 problem of more than 2**31 elements, and inputs that sample its corners.

    Most of the image is untouched zero pages, which take no memory.
    """
    spec = DCNv3Spec.of((2, 5000, 3400, 64), group=2, stride=(4900, 3300), dtype="float16")
    small = random_inputs(dataclasses.replace(spec, height=104, width=104, stride=(100, 100)))
    x = np.zeros(_static(spec.input_shape), np.float16)
    rng = np.random.default_rng(5)
    for rows in (slice(0, 4), slice(4890, 4910)):
        for cols in (slice(0, 4), slice(3290, 3310)):
            x[:, rows, cols] = rng.standard_normal(x[:, rows, cols].shape)
    return spec, Inputs(x, small.offset / np.float16(20), small.mask)
