"""The pipeline from scheduled TensorIR to CUDA source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from dcnv3_tvm.compiler.kernel_checks import UNCHECKED_KERNELS
from dcnv3_tvm.tvm_workarounds.device_code import keep_cuda_source
from dcnv3_tvm.tvm_workarounds.device_passes import (
    add_copy_offsets,
    lower_warp_memory,
    merge_conditionals,
)

PIPELINE: Final = "dcnv3_tvm.cuda"
"""Name of the pipeline, for the `tir_pipeline` of ``tvm.compile`` and ``relax.build``."""


@contextlib.contextmanager
def lowering(*, graph: bool = False, instruments: Sequence[Any] = ()) -> Iterator[None]:
    """Set the environment and the pass options that a build for GPUs needs.

    Parameters
    ----------
    graph : bool
        Let ``RewriteCUDAGraph`` capture parts of Relax functions into CUDA graphs.
    instruments : sequence of tvm.ir.instrument.PassInstrument
        Observers of the passes.
    """
    config = {
        **UNCHECKED_KERNELS,
        # Copy from global to shared memory with cp.async.
        "tirx.use_async_copy": True,
        # See tvm_workarounds: lower-warp-memory. nvcc eliminates common subexpressions itself.
        "tirx.disable_cse_tir": True,
        "relax.backend.use_cuda_graph": graph,
    }
    with (
        keep_cuda_source(),
        tvm.transform.PassContext(config=config, instruments=list(instruments)),
    ):
        yield


def cuda_sources(module: Any) -> list[str]:
    """Return the CUDA source in a compiled module and in the modules it imports."""
    own = [str(module.inspect_source("cuda"))] if module.kind == "cuda" else []
    return own + [source for part in module.imports for source in cuda_sources(part)]


def _factory() -> tuple[Any, Any, Any]:
    pipeline, host_passes, _ = compilation_pipeline.get_tir_pipeline("s_tir")
    return pipeline, host_passes, _device_passes


def _device_passes() -> tvm.transform.Pass:
    return tvm.transform.Sequential(
        [
            lower_warp_memory,
            add_copy_offsets,
            merge_conditionals,
            tirx.transform.StmtSimplify(),
            tirx.transform.LowerIntrin(),
        ]
    )


compilation_pipeline.register_tir_pipeline(PIPELINE, _factory)
