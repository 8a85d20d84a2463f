"""The model of the cost, by hand, and against the operations of whole encoders."""

import json
import math

import numpy as np
import pytest

from dcnv3_tvm.bench import cost
from dcnv3_tvm.bench.cases import encoder_case
from dcnv3_tvm.bench.cost import list_floors, tabulate
from dcnv3_tvm.bench.device_models import DEVICE_MODELS, device_model
from dcnv3_tvm.bench.floors import Peaks
from dcnv3_tvm.bench.kernels import operations, work_of
from dcnv3_tvm.bench.problems import encoder_flops
from dcnv3_tvm.cli import main
from dcnv3_tvm.compiler.kernel_listing import Kernel, KernelArgument
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.spec import DCNv3Spec
from helpers.gpu_kernels import gemm, implicit_gemm, mlp, pack_gemm_weight

TINY = "test_internimage_pre_norm"
PEAKS = Peaks(flops=1e9, bytes=1e8, how="made up", half_flops=1e10)


def kernel(function, *shapes, dtypes, calls=1):
    """Make a kernel; the last shape is the output's."""
    tensors = [KernelArgument(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return Kernel("k", "rule", function, tuple(tensors[:-1]), (tensors[-1],), calls)


def product(rows, inputs, outputs, dtype, calls=1):
    function = gemm((rows,), inputs, outputs, epilogue=Epilogue(bias=True), dtype=dtype)
    weight = pack_gemm_weight(np.zeros((outputs, inputs), dtype)).shape
    return kernel(
        function,
        *((rows, inputs), weight, (outputs,), (rows, outputs)),
        dtypes=(dtype, dtype, "float32", dtype),
        calls=calls,
    )


def test_rates_of_the_h200():
    peaks = device_model("h200").peaks
    assert (peaks.bytes, peaks.flops, peaks.half_flops) == (4.3e12, 67e12, 790e12)
    rates = {dtype: peaks.flops_in(dtype) for dtype in ("float32", "float16", "bfloat16")}
    assert rates == {"float32": 67e12, "float16": 790e12, "bfloat16": 790e12}
    assert device_model("h200").target == "cuda-sm90"


def test_every_device_model_says_where_its_rates_are_from():
    for model in DEVICE_MODELS.values():
        assert "measured" in model.peaks.how or "data sheet" in model.peaks.how
        assert model.peaks.flops < model.peaks.half_flops
    with pytest.raises(InvalidArgumentError, match="allowed: h200, h100, a100"):
        device_model("h300")


@pytest.mark.parametrize("inputs", [24, 40, 64])
def test_both_products_of_an_mlp_count(inputs):
    function = mlp((10,), inputs, 96, 20, activation="gelu", residual=False, dtype="float16")
    shapes = [[int(size) for size in param.shape] for param in function.params]
    dtypes = [str(param.dtype) for param in function.params]
    found = kernel(function, *shapes, dtypes=dtypes)
    assert operations(found) == 2 * 10 * 96 * (inputs + 20)
    assert work_of(found).dtype == "float16"


DTYPES = pytest.mark.parametrize("dtype", ["float16", "float32"])


@DTYPES
@pytest.mark.parametrize("inputs", [3, 16, 40, 112, 144, 168])
def test_what_fills_up_a_product_does_not_count(inputs, dtype):
    assert operations(product(10, inputs, 20, dtype)) == 2 * 10 * inputs * 20


@DTYPES
@pytest.mark.parametrize("channels", [3, 8, 16, 32, 56, 80])
def test_what_fills_up_a_convolution_does_not_count(channels, dtype):
    function = implicit_gemm(
        2, 9, 9, channels, 24, kernel_size=(3, 3), stride=(2, 2), pad=(1, 1), dtype=dtype
    )
    weight = pack_gemm_weight(np.zeros((24, 3, 3, channels), dtype)).shape
    found = kernel(function, (2, 9, 9, channels), weight, (2, 5, 5, 24), dtypes=(dtype,) * 3)
    assert operations(found) == 2 * 2 * 25 * 24 * 9 * channels


def test_floors_by_hand():
    short, wide = product(10, 16, 32, "float16", calls=3), product(10, 16, 32, "float32")
    rows, totals = tabulate([short, wide], PEAKS)
    flops, elements = 2 * 10 * 16 * 32, 10 * 16 + 32 * 16 + 10 * 32
    short_row, wide_row = rows
    assert (wide_row.flops, wide_row.bytes) == (flops, 4 * elements + 4 * 32)
    assert wide_row.memory == pytest.approx((4 * elements + 128) / 1e8)
    assert wide_row.arithmetic == pytest.approx(flops / 1e9)
    assert wide_row.seconds == wide_row.memory > wide_row.arithmetic
    assert (short_row.flops, short_row.bytes) == (3 * flops, 3 * (2 * elements + 4 * 32))
    assert short_row.arithmetic == pytest.approx(3 * flops / 1e10)
    assert (short_row.calls, short_row.kind, short_row.bound) == (3, "gemm", "memory")
    assert short_row.shapes == ("10x16 float16, 32x16 float16, 32 -> 10x32 float16")
    assert [total.kind for total in totals] == ["gemm", "all"]
    assert totals[-1].seconds == pytest.approx(wide_row.seconds + short_row.seconds)
    assert totals[-1].share == pytest.approx(1.0)
    assert totals[-1].calls == 4


def test_each_kernel_is_bound_by_what_takes_it_longer():
    large = product(4096, 4096, 4096, "float16")
    (row,), _ = tabulate([large], device_model("h200").peaks)
    assert row.bound == "arithmetic"
    assert row.seconds == pytest.approx(2 * 4096**3 / 790e12)
    assert row.memory == pytest.approx((3 * 2 * 4096**2 + 4 * 4096) / 4.3e12)


def test_sampling_of_halves_computes_in_float32():
    spec = DCNv3Spec.of((64, 56, 56, 128), group=8, dtype="float16", softmax=True)
    shapes = (spec.input_shape, spec.offset_shape, spec.mask_shape, spec.output_shape)
    found = kernel(tensorir.dcnv3(spec), *shapes, dtypes=("float16",) * 4)
    work = work_of(found)
    assert (work.flops, work.bytes, work.dtype) == (spec.flops, spec.bytes, "float32")
    (row,), _ = tabulate([found], device_model("h200").peaks)
    pixels = 64 * 56 * 56
    assert row.memory == pytest.approx(2 * pixels * (2 * 128 + 3 * 72) / 4.3e12)
    assert row.arithmetic == pytest.approx(72 * pixels * 128 / 67e12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floors_of_an_encoder(dtype):
    case = encoder_case(TINY, batch=2, size=(64, 64), dtype=dtype)
    listing = list_floors(case, device_model("h200"))
    whole = listing.totals[-1]
    # Offsets and mask are filled up to a whole vector, which counts here and not there.
    assert encoder_flops(case) <= whole.flops < 1.2 * encoder_flops(case)
    assert whole.seconds == pytest.approx(math.fsum(row.seconds for row in listing.rows))
    assert whole.seconds >= max(whole.memory, whole.arithmetic)
    assert [row.seconds for row in listing.rows] == sorted(
        (row.seconds for row in listing.rows), reverse=True
    )
    assert "Nothing was run" in listing.how
    (line,) = listing.summary()
    assert f"{2 / whole.seconds:.0f} images/s" in line


def test_command(capsys, tmp_path):
    arguments = ["--variant", TINY, "--size", "64"]
    files = ["--json", str(tmp_path / "f.json"), "--csv", str(tmp_path / "f.csv")]
    assert main(["bench", "floor", *arguments, *files]) == 0
    shown = capsys.readouterr().out
    for words in ("4.30 TB/s", "790 TFLOP/s", "the whole model: at least", "images/s", "memory"):
        assert words in shown
    data = json.loads((tmp_path / "f.json").read_text())
    assert (data["kind"], data["images"]) == ("floor", 1)
    assert data["totals"][-1]["kind"] == "all"
    assert {row["bound"] for row in data["rows"]} <= {"memory", "arithmetic"}
    assert (tmp_path / "f.csv").read_text().startswith("kernel,kind,calls,flops,bytes,")
    assert main(["bench", "floor", "--device-model", "h300"]) == 2
    assert "no such device model" in capsys.readouterr().err


def test_matrices_are_zeros_that_take_no_memory():
    model = cost._blank(encoder_case(TINY))
    assert not any(parameter.is_meta for parameter in model.parameters())
    for parameter in model.parameters():
        assert bool(parameter.any()) == (parameter.ndim == 1)
