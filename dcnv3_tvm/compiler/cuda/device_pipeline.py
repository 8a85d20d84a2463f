"""How TVM lowers kernels for a GPU: its pipeline for S-TIR, one pass repeated and one added."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from dcnv3_tvm.compiler.cuda.join_branches import join_branches

PIPELINE: Final = "dcnv3_tvm.cuda"
"""Name of the pipeline, for ``tir_pipeline`` of ``tvm.compile`` and ``relax.build``."""

_WARP_BUFFERS: Final = 16
"""Most buffers of a kernel that are spread over the threads of a warp.

Those of `dcnv3_tvm.schedules.gpu.mlp`: factors and sums of two products, and the factors once more
for each step behind the loop of its pipeline, of which there are at most two. DCNv3 has ten."""

_CONFIG: Final = {
    # Copies from global to shared memory that bypass registers.
    "tirx.use_async_copy": True,
    # The pass hides from LowerWarpMemory which thread an index belongs to; nvcc does the same work.
    "tirx.disable_cse_tir": True,
}


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """Set the options of TVM's passes that kernels for GPUs need, for the time of a build."""
    with tvm.transform.PassContext(config=_CONFIG):
        yield


def _factory() -> tuple[Any, Any, Any]:
    pipeline, host, _ = compilation_pipeline.get_tir_pipeline("s_tir")
    return pipeline, host, _device_passes


def _device_passes() -> tvm.transform.Pass:
    return tvm.transform.Sequential(
        [
            # It lowers one buffer and leaves those declared after it.
            *[tirx.transform.LowerWarpMemory() for _ in range(_WARP_BUFFERS)],
            join_branches,
            tirx.transform.StmtSimplify(),
            tirx.transform.LowerIntrin(),
        ]
    )


compilation_pipeline.register_tir_pipeline(PIPELINE, _factory)
