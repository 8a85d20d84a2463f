import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from dcnv3_tvm.op import relax_op
from dcnv3_tvm.transform.find_layers import find_layers
from dcnv3_tvm.transform.fuse_sampling import fuse_sampling
from dcnv3_tvm.transform.lower_cpu import CpuTiling, lower_cpu
from dcnv3_tvm.transform.storage_cpu import find_bfloat16, supports_bfloat16
from helpers.arrays import random_array
from helpers.programs import make_program, operators


def _matmul(bb, x, weight):
    return bb.emit(relax.op.matmul(x, weight))


def _norm(bb, x, gamma, beta):
    return bb.emit(relax.op.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=1e-6))


def _lowered(program):
    tiling = CpuTiling(weight_tile_width=lambda _outputs: 16, row_slack=lambda _rows: 0)
    lowered = lower_cpu(program, tiling, "bfloat16")
    relax.analysis.well_formed(lowered.module)
    return lowered


def _types(program):
    """Element types of the results of `main`, in order."""
    return [
        str(binding.var.ty.dtype.dtype)
        for block in program.module["main"].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call)
    ]


def _weights(rng, *names):
    shapes = {"square": (16, 16), "gamma": (16,), "beta": (16,), "odd": (16, 21)}
    return {name: random_array(rng, *shapes[name]) for name in names}


def test_matmul_operands_are_stored_in_bfloat16(rng):
    def build(bb, x, square, gamma, beta):
        normal = _norm(bb, x, gamma, beta)
        hidden = bb.emit(relax.op.nn.gelu(_matmul(bb, normal, square)))
        return bb.emit(relax.op.add(x, _matmul(bb, hidden, square)))

    program = make_program(build, {"x": (4, 16)}, _weights(rng, "square", "gamma", "beta"))
    lowered = _lowered(program)
    assert operators(lowered) == [
        "layer_norm_16",
        "matmul_16_16_gelu",
        "matmul_16_16_residual",
    ]
    assert _types(lowered) == ["bfloat16", "bfloat16", "float32"]
    assert lowered.weights["square:packed"].dtype == ml_dtypes.bfloat16


def test_float32_operands_are_converted_once(rng):
    def build(bb, x, square, gamma, beta):
        normal = _norm(bb, x, gamma, beta)
        first, second = _matmul(bb, normal, square), _matmul(bb, normal, square)
        return bb.emit(relax.op.add(bb.emit(relax.op.multiply(first, second)), normal))

    program = make_program(build, {"x": (4, 16)}, _weights(rng, "square", "gamma", "beta"))
    lowered = _lowered(program)
    assert operators(lowered)[:4] == [
        "layer_norm_16",
        "relax.astype",
        "matmul_16_16",
        "matmul_16_16",
    ]
    assert _types(lowered)[:2] == ["float32", "bfloat16"]


def test_model_outputs_are_float32(rng):
    def build(bb, x, square):
        hidden = _matmul(bb, x, square)
        return bb.emit(relax.Tuple([hidden, _matmul(bb, hidden, square)]))

    program = make_program(build, {"x": (4, 16)}, _weights(rng, "square"))
    types = _types(_lowered(program))
    assert types == ["bfloat16", "float32", "bfloat16", "float32"]


@pytest.mark.parametrize("shape", [(16, 21), (15, 16)])
def test_partial_vectors_or_pairs_stay_in_float32(rng, shape):
    program = make_program(_matmul, {"x": (4, shape[0])}, {"weight": random_array(rng, *shape)})
    lowered = _lowered(program)
    assert operators(lowered) == [f"matmul_{shape[0]}_{shape[1]}"]
    assert _types(lowered) == ["float32"]
    (layer,) = find_layers(program.module["main"], 1).values()
    assert not supports_bfloat16(layer)


@pytest.mark.parametrize("offset_scale", [1.0, 2.0])
def test_dcnv3_reads_float32_and_stores_bfloat16(rng, offset_scale):
    def build(bb, x, offset_weight, mask_weight, bias_offset, bias_mask, square):
        offset = bb.emit(relax.op.add(_matmul(bb, x, offset_weight), bias_offset))
        logits = bb.emit(relax.op.add(_matmul(bb, x, mask_weight), bias_mask))
        grouped = bb.emit(relax.op.reshape(logits, (1, 5, 4, 2, 9)))
        mask = bb.emit(relax.op.nn.softmax(grouped, axis=-1))
        mask = bb.emit(relax.op.reshape(mask, (1, 5, 4, 18)))
        sampled = bb.emit(relax_op.dcnv3(x, offset, mask, group=2, offset_scale=offset_scale))
        return _matmul(bb, sampled, square)

    weights = {
        "offset_weight": random_array(rng, 16, 36),
        "mask_weight": random_array(rng, 16, 18),
        "bias_offset": random_array(rng, 36),
        "bias_mask": random_array(rng, 18),
        "square": random_array(rng, 16, 16),
    }
    program = fuse_sampling(make_program(build, {"x": (1, 5, 4, 16)}, weights))
    lowered = _lowered(program)
    names, types = operators(lowered), _types(lowered)
    short = [name.rstrip("0123456789_") for name in names]
    if offset_scale == 1.0:
        assert short == ["relax.astype", "matmul", "dcnv3_packed", "matmul"]
        assert types == ["bfloat16", "float32", "bfloat16", "float32"]
    else:
        # Errors of offsets would be magnified: their matmul stays in float32.
        assert short == ["matmul", "dcnv3_packed", "matmul"]
        assert types == ["float32", "bfloat16", "float32"]


def test_values_inside_a_layer_are_not_stored(rng):
    def build(bb, x, square):
        return bb.emit(relax.op.nn.gelu(_matmul(bb, x, square)))

    program = make_program(build, {"x": (4, 16)}, _weights(rng, "square"))
    function = program.module["main"]
    values = find_bfloat16(function, find_layers(function, 1))
    assert values.stored == set()
    assert len(values.matmuls) == 1


def test_matrix_tiles_take_whole_blocks_and_convolutions(rng):
    def build(bb, x, gamma, beta, kernel, wide, narrow):
        normal = _norm(bb, x, gamma, beta)
        layout = {"data_layout": "NHWC", "kernel_layout": "OHWI", "padding": 1}
        image = bb.emit(relax.op.nn.conv2d(normal, kernel, **layout))
        return _matmul(bb, _matmul(bb, image, wide), narrow)

    shapes = {
        "gamma": 16,
        "beta": 16,
        "kernel": (32, 3, 3, 16),
        "wide": (32, 33),
        "narrow": (33, 31),
    }
    weights = {name: random_array(rng, *np.atleast_1d(shape)) for name, shape in shapes.items()}
    program = make_program(build, {"x": (1, 5, 7, 16)}, weights)
    tiling = CpuTiling(lambda _outputs: 16, lambda _rows: 0, matrix_tiles=True)
    lowered = lower_cpu(program, tiling, "bfloat16")
    relax.analysis.well_formed(lowered.module)
    assert operators(lowered) == [
        "layer_norm_16",
        "tile_convolution_16_32",
        "relax.astype",
        "tile_matmul_32_33",
        "matmul_33_31",
    ]
    assert _types(lowered) == ["float32", "float32", "bfloat16", "float32", "float32"]
    assert lowered.weights["kernel:packed"].dtype == ml_dtypes.bfloat16
    assert lowered.weights["wide:packed"].shape == (2, 1, 2, 16, 16, 2)


def test_weights_are_rounded_to_bfloat16(rng):
    weights = _weights(rng, "square")
    program = make_program(_matmul, {"x": (4, 16)}, weights)
    lowered = _lowered(program)
    packed = np.asarray(lowered.weights["square:packed"], "float32")
    # (tiles, K/2, tile, 2) back to (K, N)
    matrix = packed[0].transpose(0, 2, 1).reshape(16, 16)
    np.testing.assert_array_equal(
        matrix, weights["square"].astype(ml_dtypes.bfloat16).astype("float32")
    )
