"""Training steps of a classifier, with this library's operator and with the published sampling."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from dcnv3_tvm import files, frontend
from dcnv3_tvm.bench.backends import OURS
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.memory_worker import MemoryTask, run_worker
from dcnv3_tvm.bench.problems import Problem, aligned, encoder_flops
from dcnv3_tvm.bench.runners import Array, BackendRunner, training_runner
from dcnv3_tvm.verify.pytorch_reference import float32_sampling, with_sampling
from dcnv3_tvm.verify.random_weights import randomize_
from dcnv3_tvm.verify.tolerances import NORM_ERROR

RECOMPUTING: Final = f"{OURS}, recomputing"
"""Name of this library's model after `InternImage.recompute_activations`."""

CALLS: Final = 3
"""Steps of the process whose memory is measured; AdamW allocates its state in the first."""

TOLERANCES: Final = {"float32": 1.5e-2, "bfloat16": 0.3}
"""Largest relative L2 error of the loss, and of all gradients as one vector, by dtype: twice the
distance of either implementation from float64 in InternImage-T with random weights. That is 7e-3 in
float32 (batch 4), because a rounding moves sampling points to the next pixel, where the gradient of
the offset jumps, and 0.15 under autocast. Two in float32 differ by 1e-3 to 1.5e-3."""


def training_problem(case: EncoderCase) -> Problem:
    """Create a training step with random weights, images and labels.

    Its outputs are the loss and the gradients of all parameters, its reference those of the
    published sampling in float32.
    """
    model = randomize_(frontend.create_model(case.variant).train().requires_grad_(), seed=0)
    rng = np.random.default_rng(0)
    image = aligned(rng.standard_normal((case.batch, 3, *case.size), np.float32))
    inputs: dict[str, Array] = {
        "image": image,
        "label": rng.integers(model.config.num_classes, size=case.batch),
    }
    recomputing = copy.deepcopy(model)
    recomputing.recompute_activations()
    exact = training_runner(
        with_sampling(model, float32_sampling), inputs, torch.get_num_threads(), "float32"
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Problem(
        slug=f"{case.slug}-train",
        source=model,
        module=with_sampling(model, float32_sampling),
        inputs=inputs,
        reference=exact.outputs(exact.call()),
        tolerance=TOLERANCES[case.dtype],
        # Each matmul has two gradients.
        flops=3 * encoder_flops(case),
        # AdamW reads weights, gradients and two moments, and writes all but the gradients.
        bytes=4.0 * (7 * weights + image.size),
        dtype=case.dtype,
        measure=NORM_ERROR,
        own_modules={OURS: model, RECOMPUTING: recomputing},
        run_module=functools.partial(_step_runner, dtype=case.dtype),
    )


def _step_runner(
    module: nn.Module, inputs: dict[str, Array], threads: int, *, dtype: str
) -> BackendRunner:
    """Run training steps here, after some in a process of their own, whose memory is measured."""
    peak_bytes = _peak_memory(module, inputs, threads, dtype)
    return training_runner(module, inputs, threads, dtype)._replace(peak_bytes=peak_bytes)


def _peak_memory(module: nn.Module, inputs: dict[str, Array], threads: int, dtype: str) -> int:
    arrays: dict[str, Any] = inputs
    with files.temporary_folder("bench-") as name:
        folder = Path(name)
        np.savez(folder / "inputs.npz", **arrays)
        torch.save(module, folder / "module.pt")
        task = MemoryTask(
            backend="torch",
            model=str(folder / "module.pt"),
            inputs=str(folder / "inputs.npz"),
            outputs="",
            threads=threads,
            calls=1,
            training=dtype,
        )
        run_worker(task)  # Compiles what is not in the cache on disk, which does not count.
        peak: int = run_worker(dataclasses.replace(task, calls=CALLS))["bytes"]
    return peak
