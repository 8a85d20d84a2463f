"""Tuning for GPUs: candidates are built anywhere and measured on a real or emulated GPU."""

import json
import os
import subprocess
import sys

import pytest

import emulated_gpu
from dcnv3_tvm import gpu
from dcnv3_tvm.runtime import cuda_toolkit
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.tuning.builder import build_candidate
from dcnv3_tvm.tuning.tasks import operator_task
from dcnv3_tvm.tuning.tune import TuneConfig, estimate, tune

SPEC = DCNv3Spec.of((2, 14, 14, 64), group=4, dtype="float16")
TINY = DCNv3Spec.of((1, 3, 3, 16), group=1, dtype="float16")


@pytest.mark.skipif(cuda_toolkit.find_nvcc() is None, reason="needs nvcc")
def test_candidate_is_built_without_gpu(tmp_path):
    target = resolve_target("cuda-sm90")
    task = operator_task(SPEC, target)
    path = tmp_path / "kernel.so"
    build_candidate(task.function, target, {"thread": "one_vector", "groups": 2, "pixels": 8}, path)
    # The library itself and the cubin inside it are ELF files.
    assert b"\x7fELF" in path.read_bytes()[4:]


@pytest.mark.slow
def test_session_on_emulated_gpu(tmp_path):
    (tmp_path / "cuda").mkdir()
    work_dir = tmp_path / "work"
    options = ["--target", "cuda", "--trials", "3", "--timeout", "600", "--work-dir", work_dir]
    process = subprocess.run(
        [sys.executable, "-m", "dcnv3_tvm", "tune", TINY.slug, "--backward", *options],
        env=os.environ | emulated_gpu.install(tmp_path / "cuda"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    summary = json.loads((work_dir / "summary.json").read_text())
    assert summary["trials"] == len(summary["kernels"]) == 3
    for kernel in summary["kernels"]:
        assert kernel["failed"] == 0
        assert kernel["seconds"] > 0


@pytest.mark.skipif(not gpu.devices(), reason="needs a GPU")
def test_session_on_gpu(tmp_path):
    config = TuneConfig(target="cuda", trials=16)
    assert estimate([SPEC], config)["kernels"][0]["seconds"] > 0
    summary = tune([SPEC], tmp_path, config)
    (kernel,) = summary["kernels"]
    assert summary["trials"] == 16
    assert kernel["failed"] == 0
    assert kernel["seconds"] <= kernel["default_seconds"]
