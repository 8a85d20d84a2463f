"""Every kernel of every released variant, at its own resolution, is taken by the rule meant for it.

The kernels are built from the variants' sizes: G alone would take 12 GB to import.
"""

import dataclasses

import pytest
import tvm

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.cases import stage_specs
from dcnv3_tvm.frontend.variants import model_config
from dcnv3_tvm.op import normalization, products, tensorir
from dcnv3_tvm.op.products import Epilogue
from dcnv3_tvm.schedules import linear_tile, schedule_module
from dcnv3_tvm.targets import resolve_target

GELU = Epilogue(bias=True, activation="gelu")
RESIDUAL = Epilogue(bias=True, residual=True)


def kernels(variant, target, dtype):
    """Kernels of a variant's stages and of the convolutions around them, by the rule they need."""
    config = model_config(variant)
    for spec in stage_specs(variant):
        places, channels = (1, spec.height, spec.width), spec.channels
        packed = tensorir.packed_channels(spec)
        hidden = int(channels * config.mlp_ratio)
        for inputs, outputs, epilogue in (
            (channels, channels, RESIDUAL),
            (channels, packed, Epilogue(bias=True)),
            (channels, hidden, GELU),
            (hidden, channels, RESIDUAL),
        ):
            tile = linear_tile(outputs, target)
            yield (
                "linear",
                products.linear(places, inputs, outputs, tile=tile, epilogue=epilogue, dtype=dtype),
            )
        window = config.dw_kernel_size
        yield (
            "depthwise",
            normalization.depthwise(
                *places,
                channels,
                kernel_size=(window, window),
                pad=(window // 2, window // 2),
                bias=True,
                norm_eps=1e-6,
                activation="gelu",
                out_dtype=dtype,
            ),
        )
        yield "layer_norm", normalization.layer_norm(places, channels, eps=1e-6, out_dtype=dtype)
        yield (
            "dcnv3",
            tensorir.dcnv3_packed(dataclasses.replace(spec, softmax=True), dtype),
        )
        yield (
            "convolution",
            products.convolution(
                1,
                2 * spec.height,
                2 * spec.width,
                channels // 2,
                channels,
                kernel_size=(3, 3),
                stride=(2, 2),
                pad=(1, 1),
                tile=linear_tile(channels, target),
            ),
        )


@pytest.mark.parametrize("variant", frontend.list_models("internimage_*"))
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("cpu-znver4", "float32"), ("cpu-znver4", "bfloat16"), ("cpu-haswell", "float32")],
)
def test_every_kernel_has_its_rule(variant, name, dtype):
    target = resolve_target(name)
    wanted, functions = {}, {}
    for number, (rule, kernel) in enumerate(kernels(variant, target, dtype)):
        wanted[f"kernel{number}"] = rule
        functions[f"kernel{number}"] = kernel.with_attr("global_symbol", f"kernel{number}")
    module, rules = schedule_module(tvm.IRModule(functions), target)
    assert len(wanted) == 4 * 8
    assert rules == wanted
    assert all("T.parallel" in module[kernel].script() for kernel in functions)
