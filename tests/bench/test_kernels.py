"""Listings of kernels with times and rooflines."""

import json

import pytest

from dcnv3_tvm.bench import kernels
from dcnv3_tvm.bench.cases import DTYPES, encoder_case
from dcnv3_tvm.bench.gpu_models import gpu_model
from dcnv3_tvm.bench.kernels import list_rooflines, tabulate
from dcnv3_tvm.bench.problems import encoder_flops
from dcnv3_tvm.bench.roofline import Peaks
from dcnv3_tvm.cli import main
from dcnv3_tvm.compiler.kernel_listing import CalledKernel, KernelArgument
from dcnv3_tvm.targets import has_fast_bfloat16, resolve_target
from dcnv3_tvm.verify.placeholder_weights import placeholder_model

TINY = "test_internimage_pre_norm"
PEAKS = Peaks(flops=1e9, bytes=1e8, how="made up")


def kernel(rule, *shapes, calls=1):
    """Make a float32 kernel whose last shape is the output's."""
    *inputs, output = (KernelArgument(shape, "float32") for shape in shapes)
    return CalledKernel(f"{rule}_0", rule, None, tuple(inputs), (output,), calls)


NORM = kernel("layer_norm", (4, 8), (8,), (4, 8))
MATMUL = kernel("matmul", (2, 5, 8), (2, 8, 16), (20,), (2, 5, 20), calls=3)


def test_times_shares_and_totals():
    rows, totals = tabulate([NORM, MATMUL], PEAKS, {"matmul_0": 6e-6, "layer_norm_0": 2e-6})
    assert [row.kernel for row in rows] == ["matmul_0", "layer_norm_0"]
    assert [row.share for row in rows] == pytest.approx([0.9, 0.1])
    traffic = 4 * (80 + 256 + 20 + 200)
    assert (rows[0].bytes, rows[0].flops) == (traffic, 3200)
    assert rows[0].roofline == rows[0].memory == pytest.approx(traffic / 1e8)
    assert rows[0].arithmetic == pytest.approx(3200 / 1e9)
    assert rows[0].shapes == "2x5x8, 2x8x16, 20 -> 2x5x20"
    by_name = {total.name: total for total in totals}
    assert list(by_name) == ["matmul", "layer_norm", "matmuls", "all"]
    assert by_name["matmuls"] == kernels.KernelTotal.of("matmuls", [rows[0]], timed=True)
    assert by_name["all"].seconds == pytest.approx(20e-6)
    assert by_name["all"].calls == 4
    assert by_name["all"].flops == 9600


def test_shares_of_the_roofline_without_times():
    rows, totals = tabulate([NORM, MATMUL], PEAKS)
    assert all(row.seconds is None for row in rows)
    whole = 3 * rows[0].roofline + rows[1].roofline
    assert [row.share for row in rows] == pytest.approx(
        [3 * rows[0].roofline / whole, rows[1].roofline / whole]
    )
    assert totals[-1].roofline == pytest.approx(whole)
    assert totals[-1].seconds is None


def test_rooflines_of_an_encoder():
    case = encoder_case(TINY, batch=2, size=(64, 64), dtype="bfloat16")
    listing = list_rooflines(case, gpu_model("h200"))
    whole = listing.totals[-1]
    # The kernels pad offsets and mask to whole vectors, and `encoder_flops` does not.
    assert encoder_flops(case) <= whole.flops < 1.2 * encoder_flops(case)
    assert whole.roofline == pytest.approx(sum(row.calls * row.roofline for row in listing.rows))
    shares = [row.share for row in listing.rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0)


def test_command_with_a_device_model(capsys, tmp_path):
    path = tmp_path / "k.json"
    arguments = ["--variant", TINY, "--size", "64", "--dtype", "float16", "--json", str(path)]
    assert main(["bench", "kernels", "--device-model", "h200", *arguments]) == 0
    shown = capsys.readouterr().out
    for part in ("4.30 TB/s", "790 TFLOP/s", "Nothing was run", "matmuls: ", "all: "):
        assert part in shown
    data = json.loads(path.read_text())
    assert (data["kind"], data["model_seconds"]) == ("kernels", None)
    assert data["totals"][-1]["name"] == "all"


@pytest.mark.slow
def test_times_of_an_encoder(capsys, tmp_path, monkeypatch):
    dtype = "bfloat16" if has_fast_bfloat16(resolve_target("auto")) else "float32"
    monkeypatch.setattr(kernels, "_BURST", 1e-4)
    monkeypatch.setattr(kernels, "_MODEL_BURST", 1e-3)
    path = tmp_path / "k.json"
    case = ["--variant", TINY, "--size", "64", "--dtype", dtype, "--json", str(path)]
    assert main(["bench", "kernels", *case]) == 0
    assert "the whole model: " in capsys.readouterr().out
    data = json.loads(path.read_text())
    totals = {total["name"]: total for total in data["totals"]}
    assert {"matmul", "convolution", "dcnv3_packed", "depthwise", "layer_norm"} < set(totals)
    assert totals["all"]["seconds"] == pytest.approx(
        sum(row["calls"] * row["seconds"] for row in data["rows"])
    )
    assert sum(row["share"] for row in data["rows"]) == pytest.approx(1.0)
    # Some matmuls are padded to whole vectors, which `encoder_flops` does not count.
    flops = encoder_flops(encoder_case(TINY, size=(64, 64)))
    assert flops <= totals["all"]["flops"] < 1.2 * flops
    assert data["model_seconds"] > 0
    assert data["slug"] == f"{TINY}-n1-h64-w64-{DTYPES[dtype]}"
    assert any("bfloat16" in row["shapes"] for row in data["rows"]) == (dtype == "bfloat16")


def test_placeholder_weights():
    model = placeholder_model(TINY)
    assert not any(parameter.is_meta for parameter in model.parameters())
    for parameter in model.parameters():
        assert bool(parameter.any()) == (parameter.ndim == 1)
    shortened = placeholder_model("internimage_h", shorten=True).config
    assert (shortened.depths, shortened.level2_post_norm_block_ids) == ((1, 1, 1, 1), (0,))
    assert placeholder_model("internimage_t", shorten=True).config.depths == (1, 1, 9, 1)
