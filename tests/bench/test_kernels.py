"""Work and floors of kernels by hand, and the kernels of a whole tiny encoder."""

import csv
import json

import pytest

from dcnv3_tvm.bench import kernels
from dcnv3_tvm.bench.cases import DTYPES, encoder_case
from dcnv3_tvm.bench.floors import Peaks
from dcnv3_tvm.bench.kernels import operations, tabulate
from dcnv3_tvm.bench.problems import encoder_flops
from dcnv3_tvm.cli import main
from dcnv3_tvm.compiler.kernel_listing import Kernel, KernelArgument
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import has_bfloat16_dot, resolve_target

TINY = "test_internimage_pre_norm"
PEAKS = Peaks(flops=1e9, bytes=1e8, how="made up")


def kernel(rule, *shapes, calls=1, function=None, weight="float32"):
    """Make a kernel of tensors of float32, the last of which is the output."""
    types = ["float32", weight, "float32", "float32"]
    tensors = [KernelArgument(shape, dtype) for shape, dtype in zip(shapes, types, strict=False)]
    return Kernel(f"{rule}_0", rule, function, tuple(tensors[:-1]), (tensors[-1],), calls)


MATMUL = kernel("matmul", (2, 5, 8), (2, 8, 16), (20,), (2, 5, 20), calls=3)


def test_operations():
    assert operations(MATMUL) == 2 * 10 * 8 * 20
    convolution = kernel("convolution", (1, 9, 9, 4), (1, 3, 5, 4, 16), (1, 5, 4, 10))
    assert operations(convolution) == 2 * 20 * 10 * 3 * 5 * 4
    depthwise = kernel("depthwise", (1, 6, 7, 8), (3, 3, 8), (1, 6, 7, 8))
    assert operations(depthwise) == 2 * 6 * 7 * 8 * 9
    assert operations(kernel("layer_norm", (4, 8), (8,), (4, 8))) == 0


def test_operations_of_the_sampling_are_those_of_the_problem():
    spec = DCNv3Spec.of((1, 9, 5, 8), group=2, kernel_size=(3, 5), pad=(1, 2), remove_center=True)
    shapes = (spec.input_shape, spec.offset_shape, spec.mask_shape, spec.output_shape)
    sampling = kernel("dcnv3", *shapes, function=tensorir.dcnv3(spec))
    assert operations(sampling) == spec.flops > 0


def test_floors_shares_and_totals():
    norm = kernel("layer_norm", (4, 8), (8,), (4, 8))
    rows, totals = tabulate([norm, MATMUL], {"matmul_0": 6e-6, "layer_norm_0": 2e-6}, PEAKS)
    assert [row.kernel for row in rows] == ["matmul_0", "layer_norm_0"]
    assert [row.share for row in rows] == pytest.approx([0.9, 0.1])
    traffic = 4 * (80 + 256 + 20 + 200)
    assert (rows[0].bytes, rows[0].flops) == (traffic, 3200)
    assert rows[0].copy_floor == pytest.approx(traffic / 1e8)
    assert rows[0].arithmetic_floor == pytest.approx(3200 / 1e9)
    assert rows[0].floor == rows[0].copy_floor
    assert rows[0].shapes == "2x5x8, 2x8x16, 20 -> 2x5x20"
    by_name = {total.name: total for total in totals}
    assert list(by_name) == ["matmul", "layer_norm", "products", "all"]
    assert by_name["products"].of_peak == pytest.approx(3200e-9 / 6e-6)
    assert by_name["all"].seconds == pytest.approx(20e-6)
    assert by_name["all"].calls == 4
    assert by_name["layer_norm"].of_peak is None


def test_products_of_bfloat16_go_at_twice_the_rate():
    short = kernel("matmul", (2, 5, 8), (2, 4, 16, 2), (20,), (2, 5, 20), weight="bfloat16")
    rows, _ = tabulate([short], {"matmul_0": 1e-6}, PEAKS)
    assert rows[0].flops == operations(MATMUL)
    assert rows[0].arithmetic_floor == pytest.approx(3200 / 2e9)
    assert rows[0].bytes == 4 * (80 + 20 + 200) + 2 * 256
    assert "2x4x16x2 bfloat16" in rows[0].shapes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_of_an_encoder(capsys, tmp_path, monkeypatch, dtype):
    if dtype == "bfloat16" and not has_bfloat16_dot(resolve_target("auto")):
        pytest.skip("the processor multiplies no bfloat16")
    monkeypatch.setattr(kernels, "_BURST", 1e-4)
    monkeypatch.setattr(kernels, "_MODEL_BURST", 1e-3)
    files = ["--json", str(tmp_path / "k.json"), "--csv", str(tmp_path / "k.csv")]
    case = ["--variant", TINY, "--size", "64", "--dtype", dtype]
    assert main(["bench", "kernels", *case, *files]) == 0
    shown = capsys.readouterr().out
    for words in ("time/floor", "products: ", "% of the peak", "the whole model: ", "GFLOP/s"):
        assert words in shown
    data = json.loads((tmp_path / "k.json").read_text())
    totals = {total["name"]: total for total in data["totals"]}
    assert {"matmul", "convolution", "dcnv3", "depthwise", "layer_norm"} < set(totals)
    assert totals["all"]["seconds"] == pytest.approx(
        sum(row["calls"] * row["seconds"] for row in data["rows"])
    )
    assert sum(row["share"] for row in data["rows"]) == pytest.approx(1.0)
    # Some products are filled up to whole vectors, which counts here and not there.
    flops = encoder_flops(encoder_case(TINY, size=(64, 64)))
    assert flops <= totals["all"]["flops"] < 1.2 * flops
    assert data["model_seconds"] > 0
    with (tmp_path / "k.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == [row["kernel"] for row in data["rows"]]
    assert rows[0]["case"] == data["slug"] == f"{TINY}-n1-h64-w64-{DTYPES[dtype]}"
    assert any("bfloat16" in row["shapes"] for row in rows) == (dtype == "bfloat16")
