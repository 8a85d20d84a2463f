"""Counting parameters without building the model."""

import pytest

from dcnv3_tvm.frontend.factory import create_model
from dcnv3_tvm.frontend.models.parameter_count import parameter_count
from dcnv3_tvm.frontend.models.variants import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("features_only", [False, True])
def test_parameter_counts(name, features_only):
    model = create_model(name, features_only=features_only, device="meta")
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


def test_parameter_count_without_classes():
    model = create_model("test_internimage_pre_norm", num_classes=0, device="meta")
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
