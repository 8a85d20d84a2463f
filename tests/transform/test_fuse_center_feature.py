import numpy as np
import pytest
from tvm import relax

from dcnv3_tvm.op import relax_op, relax_packed_op
from dcnv3_tvm.transform.fuse_center_feature import fuse_center_feature
from dcnv3_tvm.transform.fuse_sampling import fuse_sampling
from helpers.programs import make_program, operators, run_program

_SHAPE, _GROUP, _POINTS = (1, 5, 4, 8), 2, 9
_CHANNELS = _SHAPE[-1]


def _weights(rng):
    widths = {"offset": 2 * _GROUP * _POINTS, "mask": _GROUP * _POINTS, "gate": _GROUP}
    return {
        f"{name}_{part}": rng.standard_normal(shape).astype("float32")
        for name, width in widths.items()
        for part, shape in (("weight", (_CHANNELS, width)), ("bias", (width,)))
    }


def _project(bb, x, weight, bias):
    return bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, weight)), bias))


def _repeated(bb, gate, tiled, share):
    """Repeat a gate for the channels of each group, in blocks of `share` channels."""
    apart = bb.emit(relax.op.expand_dims(gate, axis=[-1]))
    if tiled:
        repeated = bb.emit(relax.op.tile(apart, (1, 1, 1, 1, share)))
    else:
        shape = (*_SHAPE[:3], _GROUP, share)
        repeated = bb.emit(relax.op.broadcast_to(apart, shape))
    if share < _CHANNELS // _GROUP:
        repeated = bb.emit(relax.op.tile(repeated, (1, 1, 1, 1, _CHANNELS // _GROUP // share)))
    return bb.emit(relax.op.reshape(repeated, _SHAPE))


def _build(*, tiled=False, swapped=False, other_input=False, other_center=False, one=1.0, share=4):
    def build(bb, x, other, ow, ob, mw, mb, gw, gb):
        grouped = relax.op.reshape(_project(bb, x, mw, mb), (*_SHAPE[:3], _GROUP, _POINTS))
        softmax = bb.emit(relax.op.nn.softmax(bb.emit(grouped), axis=-1))
        mask = bb.emit(relax.op.reshape(softmax, (*_SHAPE[:3], _GROUP * _POINTS)))
        y = bb.emit(relax_op.dcnv3(other, _project(bb, x, ow, ob), mask, group=_GROUP))
        logits = _project(bb, other if other_input else x, gw, gb)
        gate = _repeated(bb, bb.emit(relax.op.sigmoid(logits)), tiled, share)
        rest = bb.emit(relax.op.subtract(relax.const(one, "float32"), gate))
        deformed = bb.emit(relax.op.multiply(*((rest, y) if swapped else (y, rest))))
        center = x if other_center else other
        plain = bb.emit(relax.op.multiply(*((gate, center) if swapped else (center, gate))))
        parts = (plain, deformed) if swapped else (deformed, plain)
        return bb.emit(relax.op.add(*parts))

    return build


def _fused(rng, build):
    program = fuse_sampling(make_program(build, {"x": _SHAPE, "other": _SHAPE}, _weights(rng)))
    fused = fuse_center_feature(program)
    relax.analysis.well_formed(fused.module)
    inputs = [rng.standard_normal(_SHAPE).astype("float32") for _ in range(2)]
    expected = run_program(program, *inputs)
    np.testing.assert_allclose(run_program(fused, *inputs), expected, rtol=1e-4, atol=1e-4)
    return fused


@pytest.mark.parametrize(
    "options", [{}, {"tiled": True}, {"swapped": True}], ids=["broadcast", "tile", "swapped"]
)
def test_blend_is_fused(options, rng):
    fused = _fused(rng, _build(**options))
    assert operators(fused) == ["relax.matmul", "relax.add", relax_packed_op.CENTER_FEATURE_OP_NAME]
    weight, bias = sorted(map(np.asarray, fused.weights.values()), key=lambda array: -array.ndim)
    # 54 offsets and logits, two gates, padded with zeros to a multiple of 16.
    assert (weight.shape, bias.shape) == ((_CHANNELS, 64), (64,))
    assert weight[:, :56].all()
    assert not weight[:, 56:].any()
    assert not bias[56:].any()


@pytest.mark.parametrize(
    "options",
    [{"other_input": True}, {"other_center": True}, {"one": 2.0}, {"share": 2}],
    ids=lambda options: next(iter(options)),
)
def test_other_blends_are_not_fused(options, rng):
    fused = _fused(rng, _build(**options))
    assert relax_packed_op.CENTER_FEATURE_OP_NAME not in operators(fused)
    assert "relax.sigmoid" in operators(fused)
