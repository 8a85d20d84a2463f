"""Errors of outputs."""

import numpy as np
import pytest
import torch

from dcnv3_tvm.bench.accuracy import largest_error


def test_max_error_is_relative_to_each_output():
    references = [np.array([100.0, -100.0]), np.array([1.0, 0.5])]
    outputs = [references[0] + 0.1, references[1] + 0.002]
    assert largest_error(outputs, references, "max") == pytest.approx(0.002)


def test_norm_error():
    references = [np.array([3.0, -4.0]), np.array([100.0, 0.0])]
    outputs = [references[0] + [0.3, 0.4], references[1] + 2.0]
    assert largest_error(outputs, references, "norm") == pytest.approx(0.1)


@pytest.mark.parametrize("measure", ["max", "norm"])
def test_many_images_of_short_types(measure):
    rng = np.random.default_rng(0)
    reference = torch.from_numpy(rng.standard_normal((19, 3, 5)))
    output = reference.half()
    difference = (output.double() - reference).numpy()
    size = np.linalg.norm if measure == "norm" else lambda array: np.abs(array).max()
    expected = size(difference) / size(reference.numpy())
    assert largest_error([output], [reference], measure) == pytest.approx(expected)


@pytest.mark.parametrize("measure", ["max", "norm"])
def test_invalid_outputs_have_no_error(measure):
    references = [np.ones((19, 3, 5)), np.ones((2, 7))]
    lost = [references[0].copy(), references[1]]
    lost[0][17, 1, 1] = np.nan
    for outputs in (lost, references[:1], [references[0].transpose(0, 2, 1), references[1]]):
        assert np.isnan(largest_error(outputs, references, measure))
