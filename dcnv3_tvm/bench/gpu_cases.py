"""Cases of the GPU benchmarks."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from dcnv3_tvm.bench.cases import DTYPES, EncoderCase, encoder_case, stage_specs
from dcnv3_tvm.compiler.compile_kernel import GRAD_OFFSET_MASK, GRAD_X
from dcnv3_tvm.frontend.models.config import KERNEL_SIZE
from dcnv3_tvm.spec import DCNv3Spec

PARTS: Final = ("op", "backward", "encoder")
"""Parts of a run, in order."""

SECONDS: Final = 450.0
"""Default time budget of a run, which including start and end takes less than eight minutes."""

PAPER_BATCH: Final = 64

PAPER: Final = ((56, 56, 128), (28, 28, 256), (14, 14, 512), (7, 7, 1024), (14, 14, 768))
"""Height, width and channels of the DCNv4 paper's comparison, at batch size `PAPER_BATCH`."""

PYRAMID: Final = ((200, 320, 64), (100, 160, 128), (50, 80, 256), (25, 40, 512))
"""Height, width and channels of a detection model's pyramid, at batch size 1."""

GROUP_CHANNELS: Final = 16
"""Channels per group of `PAPER` and `PYRAMID`."""

STAGES: Final = (
    ("internimage_t", 64),
    ("internimage_s", 64),
    ("internimage_b", 64),
    ("internimage_l", 16),
    ("internimage_xl", 16),
    ("internimage_h", 8),
)
"""Variants whose stages are measured, and batch sizes of some three million pixels."""

ENCODERS: Final = (
    "internimage_t",
    "internimage_s",
    "internimage_b",
    "internimage_l",
    "internimage_xl",
)

BATCHES: Final = (64, 1)
"""Batch sizes of encoders."""

ENCODER_DTYPE: Final = "float16"

OURS_ONLY: Final = "bfloat16"
"""Dtype in which only this library is measured."""


class GradientKernel(NamedTuple):
    """A kernel of the gradients of an operator, to compile.

    Parameters
    ----------
    kind : str
        Kind of the kernel, as for `dcnv3_tvm.compiler.compile_kernel.compile_kernel`.
    spec : DCNv3Spec
        The operator.
    """

    kind: str
    spec: DCNv3Spec

    @property
    def slug(self) -> str:
        """Kind and problem."""
        return self.spec.slug.replace("dcnv3", self.kind, 1)


_DTYPES: Final = ("float16", "float32", OURS_ONLY)
"""Dtypes of operators, in the order in which they are measured."""

CompileJob = DCNv3Spec | GradientKernel | EncoderCase
"""An operator, a kernel of its gradients, or an encoder to compile."""


class OperatorGroup(NamedTuple):
    """Operators that make up one report.

    Parameters
    ----------
    name : str
        Name in the file name.
    dtype : str
        Dtype of all operators.
    specs : tuple of DCNv3Spec
        Operators whose masks are weights, not logits.
    backward : bool
        Whether their gradients are measured, and not the operators.
    """

    name: str
    dtype: str
    specs: tuple[DCNv3Spec, ...]
    backward: bool = False

    @property
    def slug(self) -> str:
        """Name and dtype of the group."""
        return f"{self.name}-{DTYPES[self.dtype]}"


def operator_groups() -> list[OperatorGroup]:
    """List the operators, the most informative first."""
    paper = [_spec(PAPER_BATCH, *shape) for shape in PAPER]
    pyramid = [_spec(1, *shape) for shape in PYRAMID]
    groups = {"paper": paper, "pyramid": pyramid, "stages": _stages()}
    return [
        OperatorGroup(name, dtype, tuple(dataclasses.replace(spec, dtype=dtype) for spec in group))
        for dtype in _DTYPES
        for name, group in groups.items()
    ]


def backward_groups() -> list[OperatorGroup]:
    """List the operators whose gradients are measured."""
    return [
        OperatorGroup(
            "backward",
            dtype,
            tuple(dataclasses.replace(spec, dtype=dtype) for spec in _stages()),
            backward=True,
        )
        for dtype in _DTYPES
        if dtype != OURS_ONLY
    ]


def _stages() -> list[DCNv3Spec]:
    stages = (spec for variant, batch in STAGES for spec in stage_specs(variant, batch=batch))
    return list(dict.fromkeys(stages))


def encoder_cases() -> list[EncoderCase]:
    """List the encoders in the order in which they are measured."""
    return [
        encoder_case(variant, batch=batch, dtype=ENCODER_DTYPE)
        for variant in ENCODERS
        for batch in BATCHES
    ]


def select_cases(
    parts: Sequence[str], pattern: str = "*"
) -> tuple[list[OperatorGroup], list[EncoderCase]]:
    """List the cases of some parts whose slug matches a pattern."""
    found = [
        *(operator_groups() if "op" in parts else []),
        *(backward_groups() if "backward" in parts else []),
    ]
    groups = [
        group._replace(specs=tuple(spec for spec in group.specs if _matches(spec.slug, pattern)))
        for group in sorted(found, key=lambda group: _DTYPES.index(group.dtype))
    ]
    cases = encoder_cases() if "encoder" in parts else []
    return (
        [group for group in groups if group.specs],
        [case for case in cases if _matches(case.slug, pattern)],
    )


def _matches(slug: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(slug, pattern)


def compile_jobs(groups: Iterable[OperatorGroup], cases: Iterable[EncoderCase]) -> list[CompileJob]:
    """List the jobs in the order of measurement, but the slow encoders after the first group."""
    operators = [_group_jobs(group) for group in groups]
    first = operators[0] if operators else []
    later = [job for jobs in operators[1:] for job in jobs]
    return [*first, *cases, *later]


def _group_jobs(group: OperatorGroup) -> list[CompileJob]:
    if group.backward:
        return [
            GradientKernel(kind, spec)
            for spec in group.specs
            for kind in (GRAD_X, GRAD_OFFSET_MASK)
        ]
    return [*(with_logits(spec) for spec in group.specs), *group.specs]


def with_logits(spec: DCNv3Spec) -> DCNv3Spec:
    """Return the operator that computes the softmax of its mask."""
    return dataclasses.replace(spec, softmax=True)


def _spec(batch: int, height: int, width: int, channels: int) -> DCNv3Spec:
    return DCNv3Spec.of(
        (batch, height, width, channels),
        group=channels // GROUP_CHANNELS,
        kernel_size=KERNEL_SIZE,
        pad=KERNEL_SIZE // 2,
    )
