"""Least times from counted traffic by hand, and the command on a tiny encoder."""

import json

import numpy as np
import pytest

from dcnv3_tvm.bench.device_models import DeviceModel, OnChip
from dcnv3_tvm.bench.floors import Peaks
from dcnv3_tvm.bench.gpu_traffic import tabulate
from dcnv3_tvm.cli import main
from dcnv3_tvm.compiler.kernel_listing import Kernel, Tensor
from dcnv3_tvm.kernels import gemm
from dcnv3_tvm.kernels.matmul import Epilogue
from emulated_gpu.traffic import GlobalTraffic, SharedTraffic, Traffic

DEVICE = DeviceModel(
    "cuda-sm90",
    Peaks(flops=1e9, bytes=1e8, how="made up", half_flops=1e10),
    OnChip(multiprocessors=10, clock=1e6, bytes=1e9, how="made up"),
)
TRAFFIC = Traffic(
    blocks=4,
    counted_blocks=4,
    loads=GlobalTraffic(requests=10, sectors=200, least_sectors=100, block_sectors=80),
    stores=GlobalTraffic(requests=5, sectors=40, least_sectors=40, block_sectors=20),
    copied_sectors=120,
    shared_loads=SharedTraffic(requests=3, wavefronts=500, least_wavefronts=200),
    shared_stores=SharedTraffic(requests=3, wavefronts=100, least_wavefronts=100),
    products=7,
)


def test_least_times_by_hand():
    weight = gemm.pack(np.zeros((32, 16), "float16")).shape
    function = gemm.linear((10,), 16, 32, epilogue=Epilogue(), dtype="float16")
    inputs = (Tensor((10, 16), "float16"), Tensor(weight, "float16"))
    kernel = Kernel("k", "rule", function, inputs, (Tensor((10, 32), "float16"),), 3)
    row = tabulate(kernel, TRAFFIC, DEVICE)
    assert row.bytes == 3 * 2 * (10 * 16 + 32 * 16 + 10 * 32)
    assert row.memory == pytest.approx(row.bytes / 1e8)
    assert row.level_two_bytes == 3 * 32 * 100
    assert row.level_two == pytest.approx(row.level_two_bytes / 1e9)
    # Four multiprocessors have a block; what is copied past the registers counts once.
    assert row.data_path == pytest.approx(3 * (600 + (200 - 120 + 40) / 4) / (4 * 1e6))
    assert row.arithmetic == pytest.approx(3 * 7 * 4096 / 1e10)
    assert (row.bound, row.seconds) == ("data_path", row.data_path)
    assert (row.wavefronts, row.least_wavefronts) == (1800, 900)
    assert (row.load_sectors, row.least_load_sectors) == (600, 300)


@pytest.mark.slow
def test_command(capsys, tmp_path):
    arguments = ["--variant", "test_internimage_pre_norm", "--size", "32", "--blocks", "2"]
    files = ["--json", str(tmp_path / "t.json"), "--csv", str(tmp_path / "t.csv")]
    assert main(["bench", "gpu-traffic", *arguments, *files]) == 0
    shown = capsys.readouterr().out
    for words in ("At most 2 blocks", "conflicts", "the whole model: at least", "dcnv3_packed"):
        assert words in shown
    data = json.loads((tmp_path / "t.json").read_text())
    rows, whole = data["rows"], data["totals"][-1]
    assert (data["kind"], whole["kind"], whole["calls"]) == (
        "gpu-traffic",
        "all",
        sum(row["calls"] for row in rows),
    )
    for row in rows:
        assert 0 < row["least_store_sectors"] <= row["store_sectors"]
        assert row["least_wavefronts"] <= row["wavefronts"]
        assert row["seconds"] == max(row[name] for name in ("memory", row["bound"]))
    assert whole["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert (tmp_path / "t.csv").read_text().startswith("kernel,kind,calls,bytes,level_two_bytes,")
    assert main(["bench", "gpu-traffic", "--blocks", "0"]) == 2
    assert "--blocks is out of range" in capsys.readouterr().err
