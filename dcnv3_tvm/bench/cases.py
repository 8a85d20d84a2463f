"""Cases of the CPU benchmarks: operator problems of the encoders' stages, and whole encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

from dcnv3_tvm.frontend.models.config import KERNEL_SIZE, InternImageConfig
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.spec import DCNv3Spec

DETECTION_SIZE: Final = (800, 1344)
"""Height and width of a detection model's image."""

DTYPES: Final = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Dtypes of encoders and their names in slugs; float16 on GPUs only."""

TRAINING_BATCH: Final = 8
"""Batch size of the benchmarks of training."""

CPU_DTYPES: Final = ("float32", "bfloat16")
"""Dtypes of encoders on a CPU."""

SUITE: Final[tuple[tuple[str, tuple[int, int] | None], ...]] = (
    ("internimage_t", None),
    ("internimage_s", None),
    ("internimage_b", None),
    ("internimage_l", None),
    ("internimage_xl", None),
    ("internimage_h", None),
    ("internimage_t", DETECTION_SIZE),
)
"""Variants and image sizes (None: the variant's own) whose stages make up the operator suite."""


@dataclasses.dataclass(frozen=True)
class EncoderCase:
    """An encoder on images of one size.

    Parameters
    ----------
    variant : str
        Name of the model.
    batch : int
        Batch size.
    size : (int, int)
        Height and width of the image.
    features : bool
        Return the four feature maps instead of logits.
    dtype : str
        Matmul dtype of this library, one of `DTYPES`; inputs and outputs are float32.
    """

    variant: str
    batch: int
    size: tuple[int, int]
    features: bool = False
    dtype: str = "float32"

    @property
    def slug(self) -> str:
        """Unique short name, like `DCNv3Spec.slug`."""
        height, width = self.size
        kind = "-features" if self.features else ""
        return f"{self.variant}-n{self.batch}-h{height}-w{width}{kind}-{DTYPES[self.dtype]}"


def encoder_case(
    variant: str,
    *,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    features: bool = False,
    dtype: str = "float32",
) -> EncoderCase:
    """Create an encoder case, by default at the resolution of the variant.

    Raises
    ------
    InvalidArgumentError
        If the variant is unknown.

    Examples
    --------
    >>> encoder_case("internimage_l").slug
    'internimage_l-n1-h384-w384-f32'
    """
    config = model_config(variant)
    return EncoderCase(config.variant, batch, size or _own_size(config), features, dtype)


def stage_specs(
    variant: str, *, batch: int = 1, size: tuple[int, int] | None = None
) -> list[DCNv3Spec]:
    """List the operator problems of a variant's four stages.

    Raises
    ------
    InvalidArgumentError
        If the variant is unknown.

    Examples
    --------
    >>> stage_specs("internimage_t")[1].slug
    'dcnv3-n1-h28-w28-c128-g8-k3-s1-p1-d1-f32'
    """
    config = model_config(variant)
    height, width = size or _own_size(config)
    rows = zip(config.feature_strides, config.feature_channels, config.groups, strict=True)
    return [
        DCNv3Spec.of(
            # Stem and downsampling round up, which equals one division rounded up.
            (batch, -(-height // stride), -(-width // stride), channels),
            group=group,
            kernel_size=KERNEL_SIZE,
            pad=KERNEL_SIZE // 2,
            offset_scale=config.offset_scale,
            remove_center=config.remove_center,
        )
        for stride, channels, group in rows
    ]


def suite(
    entries: Sequence[tuple[str, tuple[int, int] | None]] = SUITE, *, batch: int = 1
) -> list[DCNv3Spec]:
    """List the distinct operator problems of several variants."""

    def every() -> Iterator[DCNv3Spec]:
        for variant, size in entries:
            yield from stage_specs(variant, batch=batch, size=size)

    return list(dict.fromkeys(every()))


def _own_size(config: InternImageConfig) -> tuple[int, int]:
    return config.resolution, config.resolution
