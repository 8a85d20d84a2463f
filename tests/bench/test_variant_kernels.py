"""Kernels built from sizes alone are those that the pipeline makes."""

import re

import pytest
from tvm import tirx

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.variant_kernels import variant_kernels
from dcnv3_tvm.compiler.pipeline import run_pipeline
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.random_weights import randomize_


def _types(function):
    return [str(param.dtype) for param in function.params if hasattr(param, "dtype")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_of_a_gpus_kernels(dtype):
    target = resolve_target("cuda-sm90")
    model = randomize_(frontend.create_model("internimage_t"), 0)
    imported = frontend.import_model(model, example=(8, 3, 224, 224), features="never")
    program, _ = run_pipeline(imported, target, dtype=dtype, until="fuse")
    made = {}
    for var, function in program.module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            made.setdefault(var.name_hint, []).append(_types(function))
            # A number behind a name tells kernels of one name apart.
            made.setdefault(re.sub(r"\d$", "", var.name_hint), []).append(_types(function))
    compared = 0
    for kernel in variant_kernels("internimage_t", target, dtype, batch=8):
        if kernel.name in made:
            assert _types(kernel.function) in made[kernel.name], kernel.name
            compared += 1
    assert compared >= 20
