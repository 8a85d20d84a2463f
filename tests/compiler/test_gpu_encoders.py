"""Whole encoders by their GPU schedules, the threads one after the other, against float64."""

import numpy as np
import pytest

from dcnv3_tvm import frontend
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.testing.compare import reference_outputs
from dcnv3_tvm.testing.serial import run_serially
from dcnv3_tvm.testing.tolerances import model_tolerance
from dcnv3_tvm.testing.weights import randomize_

TARGET = resolve_target("cuda-sm90")


def assert_agrees(name, shape, dtype, entry, rng):
    model = randomize_(frontend.create_model(name), seed=1)
    imported = frontend.import_model(model, example=shape)
    image = rng.standard_normal(shape).astype("float32")
    outputs = run_serially(imported, TARGET, [image], dtype=dtype, entry=entry)
    measure, bound = model_tolerance(dtype)
    expected = reference_outputs(model, image)[entry]
    assert len(outputs) == len(expected)
    for output, truth in zip(outputs, expected, strict=True):
        assert output.dtype == np.float32
        error = output.astype(np.float64) - truth
        if measure == "max":
            assert np.abs(error).max() <= bound * np.abs(truth).max()
        else:
            assert np.linalg.norm(error) <= bound * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pre_norm(dtype, rng):
    assert_agrees("test_internimage_pre_norm", (2, 3, 32, 64), dtype, "features", rng)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_pooling_and_center_feature_scale(dtype, rng):
    assert_agrees("test_internimage_res_post_norm", (1, 3, 64, 96), dtype, "main", rng)


@pytest.mark.slow
def test_t(rng):
    assert_agrees("internimage_t", (1, 3, 96, 160), "float16", "main", rng)
