"""The pipeline from scheduled TensorIR to LLVM."""

from __future__ import annotations

from typing import Any, Final

import tvm
from tvm.tirx import compilation_pipeline

from dcnv3_tvm.tvm_workarounds.host_passes import allocate_on_stack, round_to_bfloat16

PIPELINE: Final = "dcnv3_tvm.cpu"
"""Name of the pipeline, for the `tir_pipeline` of ``tvm.compile`` and ``relax.build``."""


def _factory() -> tuple[Any, Any, Any]:
    pipeline, host_passes, device_passes = compilation_pipeline.get_tir_pipeline("s_tir")

    def all_host_passes() -> tvm.transform.Pass:
        return tvm.transform.Sequential([allocate_on_stack, round_to_bfloat16, host_passes()])

    return pipeline, all_host_passes, device_passes


compilation_pipeline.register_tir_pipeline(PIPELINE, _factory)
