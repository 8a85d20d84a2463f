import pytest

from dcnv3_tvm.frontend.factory import create_model
from dcnv3_tvm.frontend.models.parameter_count import parameter_count
from dcnv3_tvm.frontend.models.variants import VARIANTS

PUBLISHED = {
    "internimage_t": 29_918_424,
    "internimage_s": 50_079_880,
    "internimage_b": 97_461_832,
    "internimage_l": 223_334_810,
    "internimage_xl": 334_819_780,
    "internimage_h": 1_089_636_760,
    "internimage_g": 3_076_373_352,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert parameter_count(VARIANTS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("features_only", [False, True])
def test_count_equals_that_of_the_built_model(name, features_only):
    model = create_model(name, features_only=features_only, device="meta")
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


def test_count_without_classes():
    model = create_model("test_internimage_pre_norm", num_classes=0, device="meta")
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
