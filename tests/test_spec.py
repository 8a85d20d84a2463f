import dataclasses
import inspect
import json

import numpy as np
import pytest

from dcnv3_tvm.compiler.functional import dcnv3
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.spec import PARAMETERS, DCNv3Keywords, DCNv3Params, DCNv3Spec


def test_shapes_and_costs():
    spec = DCNv3Spec.of((2, 9, 7, 12), group=3, kernel_size=(3, 5), stride=(2, 1), pad=(1, 2))
    assert spec.points == 15
    assert spec.output_size == (5, 7)
    assert spec.input_shape == (2, 9, 7, 12)
    assert spec.offset_shape == (2, 5, 7, 90)
    assert spec.mask_shape == (2, 5, 7, 45)
    assert spec.output_shape == (2, 5, 7, 12)
    assert spec.flops == 2 * 4 * 15 * (2 * 5 * 7 * 12)
    assert spec.bytes == 4 * (2 * 9 * 7 * 12 + 2 * 5 * 7 * (90 + 45 + 12))


def test_points_are_column_major_without_the_center():
    spec = DCNv3Spec.of((1, 5, 5, 2), group=1, kernel_size=3, remove_center=True)
    assert spec.points == 8
    assert spec.kernel_points[:5] == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2))


@pytest.mark.parametrize("size", [1, 2, 5, 8, 33])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_output_size_is_the_number_of_windows(size, kernel, stride, dilation):
    pad = dilation * kernel
    spec = DCNv3Spec.of(
        (1, size, size, 1), group=1, kernel_size=kernel, stride=stride, pad=pad, dilation=dilation
    )
    extent = dilation * (kernel - 1) + 1
    windows = len(range(-pad, size + pad - extent + 1, stride))
    assert spec.output_size == (windows, windows)


def test_dynamic_sizes():
    spec = DCNv3Spec.of((None, 8, None, 6), group=2)
    assert spec.output_shape == (None, 8, None, 6)
    assert not spec.is_static
    with pytest.raises(InvalidArgumentError, match="defined only for a static problem"):
        _ = spec.flops


def test_slug_distinguishes_every_parameter():
    spec = DCNv3Spec.of((1, 56, 56, 64), group=4)
    assert spec.slug == "dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f32"
    changes = [
        {"batch": None},
        {"height": 55},
        {"width": 57},
        {"group": 8, "group_channels": 8},
        {"group_channels": 32},
        {"kernel_size": (3, 5)},
        {"stride": (2, 1)},
        {"pad": (0, 1)},
        {"dilation": (1, 2)},
        {"offset_scale": 2.0},
        {"remove_center": True},
        {"softmax": True},
        {"dtype": "float16"},
    ]
    slugs = {dataclasses.replace(spec, **change).slug for change in changes}
    assert len(slugs | {spec.slug}) == len(changes) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 3}, "64 channels of x cannot be divided into 3 groups"),
        ({"group": 0}, "group is out of range"),
        ({"kernel_size": 0}, "kernel_size is out of range"),
        ({"kernel_size": (3, 3, 3)}, "not an integer or a"),
        ({"kernel_size": 2.5}, "not an integer or a"),
        ({"stride": (0, 1)}, "stride is out of range"),
        ({"pad": -1}, "pad is out of range"),
        ({"dilation": 0}, "dilation is out of range"),
        ({"stride": "33"}, "stride is not an integer or a"),
        ({"offset_scale": float("nan")}, "not a finite number"),
        ({"offset_scale": "2"}, "not a finite number"),
        ({"offset_scale": None}, "not a finite number"),
        ({"offset_scale": 1e300}, "not a finite number"),
        ({"offset_scale": np.complex64(1 + 2j)}, "not a finite number"),
        ({"offset_scale": True}, "not a finite number"),
        ({"softmax": np.ones(2)}, "softmax is not a boolean"),
        ({"remove_center": 1.0}, "remove_center is not a boolean"),
        ({"kernel_size": np.array([3.0, 3.0])}, "not an integer or a"),
        ({"stride": np.bool_(True)}, "not an integer or a"),
        ({"softmax": "no"}, "softmax is not a boolean"),
        ({"dtype": "int8"}, "dtype is not supported"),
        ({"kernel_size": 4, "remove_center": True}, "needs an odd kernel"),
        ({"kernel_size": 1, "remove_center": True}, "leaves no point"),
        ({"kernel_size": 15, "pad": 0}, "the output height would be -6"),
    ],
)
def test_bad_parameters_are_rejected(change, message):
    with pytest.raises(InvalidArgumentError, match=message):
        DCNv3Spec.of((1, 8, 8, 64), **{"group": 4, **change})


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (-1, 8, 8, 64), (1, 0, 8, 64), (1, 8, 8, 0), (1, 8, 8, 4.0)]
)
def test_bad_shapes_are_rejected(shape):
    with pytest.raises(InvalidArgumentError, match="got"):
        DCNv3Spec.of(shape, group=4)


def test_nchw_shape_gets_a_hint():
    with pytest.raises(InvalidArgumentError, match="NHWC is expected"):
        DCNv3Spec.of((1, 64, 7, 7), group=4)


def test_params_are_normalized():
    params = DCNv3Params(group=2, kernel_size=5, stride=[2, 3], offset_scale=2, remove_center=1)
    assert params == DCNv3Params(
        group=2, kernel_size=(5, 5), stride=(2, 3), offset_scale=2.0, remove_center=True
    )
    assert type(params.offset_scale) is float
    assert type(params.remove_center) is bool
    assert DCNv3Params(**params.keywords()) == params


def test_keywords_have_one_set_of_names_and_defaults():
    parameters = inspect.signature(DCNv3Params).parameters
    assert tuple(parameters) == PARAMETERS
    assert set(DCNv3Keywords.__annotations__) == set(PARAMETERS)
    functional = inspect.signature(dcnv3).parameters
    assert [functional[name] for name in PARAMETERS] == list(parameters.values())


def test_spec_round_trips_through_slug_and_json():
    spec = DCNv3Spec.of(
        (None, 9, 8, 12), group=3, kernel_size=(3, 5), pad=(1, 2), remove_center=True, softmax=True
    )
    assert DCNv3Spec.from_slug(spec.slug) == spec
    assert DCNv3Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.params == DCNv3Params(
        group=3, kernel_size=(3, 5), pad=(1, 2), remove_center=True, softmax=True
    )


@pytest.mark.parametrize("slug", ["", "dcnv3-n1", "conv-n1-h8-w8-c8-g2-k3-s1-p1-d1-f32"])
def test_bad_slugs_are_rejected(slug):
    with pytest.raises(InvalidArgumentError, match="is not a slug"):
        DCNv3Spec.from_slug(slug)
