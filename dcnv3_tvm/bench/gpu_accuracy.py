"""How far an encoder compiled for a GPU is from float64, with no GPU at hand."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dcnv3_tvm import frontend, targets
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.listing import Listing
from dcnv3_tvm.compiler.compile import compile_artifact
from dcnv3_tvm.provenance import Provenance
from dcnv3_tvm.verify.compare import Difference, difference, pytorch_outputs, reference_outputs
from dcnv3_tvm.verify.random_weights import randomize_
from dcnv3_tvm.verify.tolerances import model_tolerance
from emulated_gpu import EmulatedGpu


@dataclasses.dataclass(frozen=True)
class Accuracy(Difference):
    """How far one output is from the truth, and how far PyTorch's is.

    Parameters
    ----------
    pytorch : float
        The norm error of eager PyTorch with all tensors in the same type, on the processor.
    """

    pytorch: float


@dataclasses.dataclass(frozen=True)
class AccuracyListing(Listing[Accuracy]):
    """Every output of an encoder against the truth.

    Parameters
    ----------
    target : str
        What the kernels are scheduled for.
    dtype : str
        Element type of the products.
    """

    KIND: ClassVar[str] = "gpu-accuracy"
    HEADER: ClassVar[tuple[str, ...]] = (
        "output",
        "max error",
        "mean error",
        "norm error",
        "PyTorch's",
        "max |reference|",
        "",
    )

    target: str
    dtype: str

    @property
    def ok(self) -> bool:
        """Whether every output is close enough."""
        return all(row.within(self.dtype) for row in self.rows)

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of a table for people, under `HEADER`."""
        return [
            (
                row.output,
                f"{row.maximum:.2e}",
                f"{row.mean:.2e}",
                f"{row.norm:.2e}",
                f"{row.pytorch:.2e}",
                f"{row.scale:.4g}",
                "ok" if row.within(self.dtype) else "TOO FAR",
            )
            for row in self.rows
        ]

    def summary(self) -> list[str]:
        """Return the verdict."""
        measure, bound = model_tolerance(self.dtype)
        verdict = "agrees with" if self.ok else "DIFFERS from"
        return [f"{verdict} float64 (tolerance of the {measure} error {bound:g})"]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        measure, bound = model_tolerance(self.dtype)
        return super().to_json() | {"measure": measure, "tolerance": bound, "ok": self.ok}


def list_accuracy(
    case: EncoderCase,
    target: str,
    *,
    seed: int = 0,
    on_step: Callable[[str], None] = lambda _: None,
) -> AccuracyListing:
    """Run an encoder on an emulated GPU, and compare it with float64.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    target : str
        The GPU, for example ``"cuda-sm90"``.
    seed : int
        Of the random weights and the random image.
    on_step : callable
        Called with what happens next.

    Raises
    ------
    TargetError
        If the target is no GPU that kernels are scheduled for.
    """
    resolved = targets.resolve_gpu(target)
    on_step(f"{case.slug}: import")
    model = randomize_(frontend.create_model(case.variant, features_only=case.features), seed)
    shape = (case.batch, 3, *case.size)
    imported = frontend.import_model(model, example=shape)
    image = np.random.default_rng(seed).standard_normal(shape, np.float32)
    on_step(f"{case.slug}: compute in float64")
    truth = reference_outputs(model, image)
    on_step(f"{case.slug}: compute in {case.dtype} with PyTorch")
    peer = pytorch_outputs(model, image, getattr(torch, case.dtype))
    on_step(f"{case.slug}: compile and run")
    arch = str(resolved.attrs["arch"])
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-") as folder, EmulatedGpu(arch) as gpu:
        path = Path(folder) / "encoder"
        with gpu.compiling():
            compile_artifact(imported, path, target=target, dtype=case.dtype)
        found = gpu.run_model(path, [image])
    rows = []
    for entry, outputs in found.items():
        names = [f"{entry}/{tensor.name}" for tensor in imported.entries[entry].outputs]
        for name, ours, theirs, expected in zip(
            names, outputs, peer[entry], truth[entry], strict=True
        ):
            pytorch = difference(name, theirs, expected).norm
            rows.append(Accuracy(**vars(difference(name, ours, expected)), pytorch=pytorch))
    return AccuracyListing(
        slug=case.slug,
        provenance=Provenance.here(threads=1),
        how=f"The artifact for {targets.target_slug(resolved)}, on a GPU that is emulated by the "
        "processor, against PyTorch in float64. Errors are relative to max |reference|, the norm "
        "error to its norm; PyTorch's is that of eager PyTorch in the same type. Random weights "
        f"and image, seed {seed}.",
        rows=tuple(rows),
        target=targets.target_slug(resolved),
        dtype=case.dtype,
    )
