"""What multiplies in float16 where a model is compiled in bfloat16."""

import numpy as np
import pytest
from tvm import relax, tirx

from dcnv3_tvm import frontend
from dcnv3_tvm.compiler.pipeline import run_pipeline
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.transform.lower_gpu import lower_layers_gpu
from dcnv3_tvm.verify.random_weights import randomize_
from helpers.programs import make_program, run_program


def _normalized_mlp(bb, x, gamma, beta, first, second):
    """LayerNorm, a product, GELU, and another product."""
    value = bb.emit(relax.op.nn.layer_norm(x, gamma, beta, axes=[-1]))
    hidden = bb.emit(relax.op.nn.gelu(bb.emit(relax.op.matmul(value, first))))
    return bb.emit(relax.op.matmul(hidden, second))


def _weights(rng):
    return {
        "gamma": rng.uniform(0.5, 1.5, 16).astype("float32"),
        "beta": rng.standard_normal(16).astype("float32"),
        "first": rng.standard_normal((16, 48)).astype("float32"),
        "second": rng.standard_normal((48, 16)).astype("float32"),
    }


def _types(program):
    return {
        var.name_hint: [str(param.dtype) for param in function.params]
        for var, function in program.module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }


def _lowered(weights, dtype="bfloat16"):
    program = make_program(_normalized_mlp, {"x": (5, 16)}, weights)
    return program, lower_layers_gpu(program, dtype)


def test_behind_a_norm(rng):
    _, lowered = _lowered(_weights(rng))
    assert _types(lowered) == {
        "layer_norm_16": ["float32", "float32", "float32", "float16"],
        "matmul_16_48_gelu": ["float16", "float16", "float16"],
        "matmul_48_16": ["float16", "float16", "float32"],
    }


def test_a_product_of_large_weights_ends_the_bound(rng):
    weights = _weights(rng)
    weights["first"] *= np.float32(3e3)
    program, lowered = _lowered(weights)
    assert _types(lowered) == {
        "layer_norm_16": ["float32", "float32", "float32", "float16"],
        "matmul_16_48_gelu": ["float16", "float16", "bfloat16"],
        "matmul_48_16": ["bfloat16", "bfloat16", "float32"],
    }
    x = rng.standard_normal((5, 16)).astype("float32")
    expected = run_program(program, x)
    assert np.linalg.norm(run_program(lowered, x) - expected) <= 1e-2 * np.linalg.norm(expected)


def test_what_has_no_bound_stays_in_bfloat16(rng):
    weights = {"first": rng.standard_normal((16, 48)).astype("float32")}
    program = make_program(
        lambda bb, x, first: bb.emit(relax.op.matmul(x, first)), {"x": (5, 16)}, weights
    )
    lowered = lower_layers_gpu(program, "bfloat16")
    assert _types(lowered) == {"matmul_16_48": ["float32", "bfloat16", "float32"]}


def test_a_model():
    """Norms, products, samplings, the mean of pixels: all is bounded."""
    model = randomize_(frontend.create_model("test_internimage_pre_norm"), 1)
    imported = frontend.import_model(model, example=(1, 3, 32, 32), features="never")
    target = resolve_target("cuda-sm90")
    program, _ = run_pipeline(imported, target, dtype="bfloat16", until="fuse")
    assert not any("bfloat16" in types for types in _types(program).values())


@pytest.mark.parametrize(
    ("name", "factor"),
    [("gamma", 1e4), ("beta", 1e5), ("first", 1e6), ("first", 1e-6), ("gamma", 1e-3)],
)
def test_what_float16_cannot_hold_well_stays_in_bfloat16(name, factor, rng):
    weights = _weights(rng)
    weights[name] *= np.float32(factor)
    if name == "gamma":
        weights["beta"] *= np.float32(min(1.0, factor))
    program, lowered = _lowered(weights)
    assert _types(lowered)["matmul_16_48_gelu"] == ["bfloat16"] * 3
    x = rng.standard_normal((5, 16)).astype("float32")
    expected = run_program(program, x)
    assert np.linalg.norm(run_program(lowered, x) - expected) <= 1e-2 * np.linalg.norm(expected)


def test_any_range_of_what_is_normalized(rng):
    program, lowered = _lowered(_weights(rng))
    x = np.float32(1e16) * rng.standard_normal((5, 16)).astype("float32")
    expected = run_program(program, x)
    assert np.linalg.norm(run_program(lowered, x) - expected) <= 1e-2 * np.linalg.norm(expected)


def _convolution(bb, x, weight):
    options = {"strides": (2, 2), "padding": (1, 1), "data_layout": "NHWC"}
    return bb.emit(relax.op.nn.conv2d(x, weight, kernel_layout="OHWI", **options))


def test_images(rng):
    weight = rng.standard_normal((8, 3, 3, 3)).astype("float32")
    program = make_program(_convolution, {"x": (1, 6, 8, 3)}, {"weight": weight})
    lowered = lower_layers_gpu(program, "bfloat16")
    assert _types(lowered) == {"convolution_3_8": ["float32", "float16", "float32"]}
    x = 255 * rng.random((1, 6, 8, 3), "float32")
    expected = run_program(program, x)
    assert np.linalg.norm(run_program(lowered, x) - expected) <= 2e-3 * np.linalg.norm(expected)


def test_images_of_any_size_with_their_channels_first(rng):
    weight = rng.standard_normal((8, 3, 3, 3)).astype("float32")
    program = make_program(
        lambda bb, x, weight: _convolution(
            bb, bb.emit(relax.op.permute_dims(x, [0, 2, 3, 1])), weight
        ),
        {"x": ("n", 3, "h", "w")},
        {"weight": weight},
    )
    lowered = lower_layers_gpu(program, "bfloat16")
    assert _types(lowered) == {"convolution_3_8": ["float32", "float16", "float32"]}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_in_bfloat16(dtype, rng):
    _, lowered = _lowered(_weights(rng), dtype)
    assert _types(lowered)["matmul_16_48_gelu"] == [dtype] * 3
