"""The two reference implementations, compared with each other and with cases worked by hand."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from dcnv3_tvm.op.reference import dcnv3_loops, dcnv3_reference
from dcnv3_tvm.spec import DCNv3Spec
from helpers.specs import random_inputs, specs


@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(spec=specs("float64"))
def test_loops_and_arrays_agree(spec):
    samples = np.prod([int(size) for size in spec.mask_shape])
    assume(samples < 20_000)
    inputs = random_inputs(spec, seed=spec.points)
    loops = dcnv3_loops(inputs.x, inputs.offset, inputs.mask, spec)
    arrays = dcnv3_reference(inputs.x, inputs.offset, inputs.mask, spec)
    assert loops.shape == spec.output_shape
    np.testing.assert_allclose(arrays, loops, rtol=1e-12, atol=1e-12)


BOTH = pytest.mark.parametrize("reference", [dcnv3_loops, dcnv3_reference])


@BOTH
def test_zero_offsets_and_unit_masks_are_a_box_filter(reference, rng):
    spec = DCNv3Spec.of((1, 6, 5, 4), group=2)
    x = rng.standard_normal((1, 6, 5, 4))
    y = reference(x, np.zeros((1, 6, 5, 36)), np.ones((1, 6, 5, 18)), spec)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    box = sum(padded[:, j : j + 6, i : i + 5] for j in range(3) for i in range(3))
    np.testing.assert_allclose(y, box, atol=1e-13)


@BOTH
def test_order_of_kernel_points_and_offsets(reference):
    """Point 1 of a 3x3 kernel is in the left column and middle row; x comes before y."""
    spec = DCNv3Spec.of((1, 5, 5, 1), group=1)
    x = np.arange(25.0).reshape(1, 5, 5, 1)
    mask = np.zeros((1, 5, 5, 9))
    mask[..., 1] = 1.0
    offset = np.zeros((1, 5, 5, 18))
    plain = reference(x, offset, mask, spec)
    assert plain[0, 2, 2, 0] == x[0, 2, 1, 0]
    offset[..., 2] = 2.0
    assert reference(x, offset, mask, spec)[0, 2, 2, 0] == x[0, 2, 3, 0]
    offset[..., 2], offset[..., 3] = 0.0, 2.0
    assert reference(x, offset, mask, spec)[0, 2, 2, 0] == x[0, 4, 1, 0]


@BOTH
def test_values_fade_out_within_one_pixel_of_the_border(reference):
    spec = DCNv3Spec.of((1, 1, 1, 1), group=1, kernel_size=1, pad=0)
    x, mask = np.full((1, 1, 1, 1), 8.0), np.ones((1, 1, 1, 1))
    for shift, expected in ((0.0, 8.0), (-0.5, 4.0), (0.75, 2.0), (-1.0, 0.0), (1.0, 0.0)):
        for axis in (0, 1):
            offset = np.zeros((1, 1, 1, 2))
            offset[..., axis] = shift
            assert reference(x, offset, mask, spec).item() == expected


@BOTH
def test_offset_scale_scales_the_grid(reference):
    spec = DCNv3Spec.of((1, 9, 9, 1), group=1, offset_scale=2.0)
    x = np.arange(81.0).reshape(1, 9, 9, 1)
    mask = np.zeros((1, 9, 9, 9))
    mask[..., 0] = 1.0
    y = reference(x, np.zeros((1, 9, 9, 18)), mask, spec)
    assert y[0, 4, 4, 0] == x[0, 2, 2, 0]


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_non_finite_and_huge_offsets_contribute_nothing(reference, value):
    spec = DCNv3Spec.of((1, 3, 4, 2), group=1)
    inputs = random_inputs(spec)
    offset = inputs.offset.copy()
    offset[..., 4] = value
    mask = inputs.mask.copy()
    y = reference(inputs.x, offset, mask, spec)
    mask[..., 2] = 0.0
    np.testing.assert_array_equal(y, reference(inputs.x, inputs.offset, mask, spec))
