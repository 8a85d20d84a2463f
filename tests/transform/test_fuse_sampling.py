import functools

import numpy as np
import pytest
from tvm import relax

from dcnv3_tvm.op import relax_op, relax_packed_op
from dcnv3_tvm.op.relax_call import params_of
from dcnv3_tvm.transform.fuse_sampling import fuse_sampling
from helpers.arrays import random_array
from helpers.programs import make_program, operators, run_program

_N, _H, _W, _C, _GROUP, _POINTS = 1, 5, 4, 8, 2, 9


def _weights(rng):
    random = functools.partial(random_array, rng)
    return {
        "offset_weight": random(_C, _GROUP * _POINTS * 2),
        "offset_bias": random(_GROUP * _POINTS * 2),
        "mask_weight": random(_C, _GROUP * _POINTS),
        "mask_bias": random(_GROUP * _POINTS),
    }


def _project(bb, x, weight, bias):
    return bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, weight)), bias))


def _softmax(bb, logits, points=_POINTS):
    grouped = bb.emit(relax.op.reshape(logits, (_N, _H, _W, -1, points)))
    weights = bb.emit(relax.op.nn.softmax(grouped, axis=-1))
    return bb.emit(relax.op.reshape(weights, (_N, _H, _W, _GROUP * _POINTS)))


def _build(second_source=False, points=_POINTS, mask_used_twice=False):
    def build(bb, x, other, offset_weight, offset_bias, mask_weight, mask_bias):
        offset = _project(bb, x, offset_weight, offset_bias)
        source = other if second_source else x
        mask = _softmax(bb, _project(bb, source, mask_weight, mask_bias), points)
        out = bb.emit(relax_op.dcnv3(x, offset, mask, group=_GROUP))
        if mask_used_twice:
            out = bb.emit(relax.op.add(out, bb.emit(relax.op.sum(mask))))
        return out

    return build


def _fused(rng, build):
    shape = (_N, _H, _W, _C)
    program = make_program(build, {"x": shape, "other": shape}, _weights(rng))
    fused = fuse_sampling(program)
    relax.analysis.well_formed(fused.module)
    inputs = [rng.standard_normal(shape).astype("float32") for _ in range(2)]
    expected = run_program(program, *inputs)
    np.testing.assert_allclose(run_program(fused, *inputs), expected, rtol=1e-4, atol=1e-4)
    return fused


def test_projections_of_one_tensor_are_merged(rng):
    fused = _fused(rng, _build())
    assert operators(fused) == ["relax.matmul", "relax.add", relax_packed_op.OP_NAME]
    weight, bias = sorted(map(np.asarray, fused.weights.values()), key=lambda array: -array.ndim)
    # 54 offsets and logits, padded with zeros to a multiple of 16.
    assert (weight.shape, bias.shape) == ((_C, 64), (64,))
    assert weight[:, :54].all()
    assert not weight[:, 54:].any()
    assert not bias[54:].any()


def test_projections_of_two_tensors_are_not_merged(rng):
    fused = _fused(rng, _build(second_source=True))
    assert operators(fused) == ["relax.matmul", "relax.add"] * 2 + [relax_op.OP_NAME]
    calls = [binding.value for binding in fused.module["main"].body.blocks[0].bindings]
    (call,) = [call for call in calls if relax_op.is_dcnv3(call)]
    assert params_of(call).softmax


@pytest.mark.parametrize("build", [_build(points=6), _build(mask_used_twice=True)])
def test_other_softmaxes_are_not_fused(rng, build):
    fused = _fused(rng, build)
    assert "relax.nn.softmax" in operators(fused)
    assert relax_op.OP_NAME in operators(fused)
