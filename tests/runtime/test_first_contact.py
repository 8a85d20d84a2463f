"""The checks of a new GPU, without TVM's Python package and PyTorch, on the emulated GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS_FOLDER = Path(__file__).parents[1]
SCRIPT = TESTS_FOLDER.parent / "benchmarks" / "gpu_first_contact.py"
BLOCK_IMPORTS = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "tvm"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""
# Finds an error in whatever runs under the tool racecheck.
SANITIZER = """#!/bin/sh
tool=$2
shift 4
"$@"
echo "========= ERROR SUMMARY"
test $tool != racecheck || exit 99
"""
# What tests/runtime/test_gpu.py needs without TVM, which it does on a real GPU only.
TESTS = """
import sys
import numpy as np
import dcnv3_tvm as dt
from pathlib import Path
from dcnv3_tvm import runtime
from dcnv3_tvm.compiler import compile_kernel
from helpers import prebuilt

assert not prebuilt.HAS_TVM
compile_kernel._compile = prebuilt.read_kernel
for spec in prebuilt.operators():
    assert dt.compile_op(spec, "cuda").kernel._function
toy = prebuilt.PrebuiltToy.read()
with runtime.load(toy.write(Path(sys.argv[1]))) as model:
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    assert np.array_equal(model(image), toy.main(image))
"""
ENCODER = "test_internimage_pre_norm"
PREPARE = ("--batch", "5", "--size", "64", "--bench", "dcnv3-n64-h56-w56-c64-*-bf16")
FIRST_OPERATOR = "dcnv3-n2-h13-w11-c64-g4-k3-s1-p1-d1-softmax-f32"


@pytest.fixture(scope="module")
def call(emulated, tmp_path_factory):
    blocked = tmp_path_factory.mktemp("blocked")
    (blocked / "sitecustomize.py").write_text(BLOCK_IMPORTS)

    def start(*arguments, **environment):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | emulated | {"FAKE_BYTES": str(2**26)} | environment,
            check=False,
        )

    def run(folder, *arguments, **environment):
        (folder / "records.jsonl").unlink(missing_ok=True)
        done = start(SCRIPT, "run", folder, *arguments, PYTHONPATH=str(blocked), **environment)
        lines = (folder / "records.jsonl").read_text().splitlines()
        records = {record["name"]: record for record in map(json.loads, lines)}
        assert len(done.stdout.splitlines()) == len(records), done.stderr
        return done.returncode, records

    return start, run, blocked


@pytest.fixture(scope="module")
def folder(call, tmp_path_factory):
    start, _, _ = call
    path = tmp_path_factory.mktemp("contact") / "folder"
    done = start(SCRIPT, "prepare", path, "--variant", ENCODER, *PREPARE)
    assert done.returncode == 0, done.stderr
    return path


def test_checks_of_a_new_gpu(call, folder, tmp_path):
    start, run, blocked = call
    code, records = run(folder)
    assert code == 0, records
    not_run = {name: record["error"] for name, record in records.items() if record["ok"] is None}
    missing = "compute-sanitizer is not installed"
    assert not_run == {
        "toy, then PyTorch": "PyTorch is not installed",
        "PyTorch, then toy": "PyTorch is not installed",
        "toy on PyTorch's tensors": "PyTorch is not installed",
        "tests/runtime/test_gpu.py": "PyTorch is not installed",
        "bench gpu": "PyTorch is not installed; 2 kernels were loaded",
        **dict.fromkeys(
            (f"compute-sanitizer {tool}" for tool in ("memcheck", "racecheck", "synccheck")),
            missing,
        ),
    }
    passed = {name for name, record in records.items() if record["ok"]}
    assert passed >= {"device", "toy", FIRST_OPERATOR, "encoder-plain", "encoder-graph"}
    assert passed >= {"two streams", "out of memory", "two threads", f"{ENCODER}-n5"}

    environment = {
        "PYTHONPATH": f"{blocked}:{TESTS_FOLDER}",
        "DCNV3_TVM_FIRST_CONTACT": str(folder),
    }
    done = start("-c", TESTS, tmp_path / "toy", **environment)
    assert done.returncode == 0, done.stderr

    # A failed check is reported, and the others go on.
    expected = folder / "expected" / f"{FIRST_OPERATOR}.npz"
    arrays = dict(np.load(expected))
    arrays["expected0"][1, 2, 3, 4] += 1e-3
    np.savez(expected, **arrays)
    code, records = run(folder, "--only", "dcnv3-*")
    assert code == 1
    failed = records.pop(FIRST_OPERATOR)
    assert not failed["ok"]
    assert "1 of 18304 elements are outside of their bounds" in failed["error"]
    assert len(records) == 3
    assert all(record["ok"] for record in records.values())

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    search = f"{tmp_path}:{os.environ['PATH']}"
    code, records = run(folder, "--only", "compute-sanitizer*", PATH=search)
    assert code == 1
    assert [record["ok"] for record in records.values()] == [True, False, True]
    error = records["compute-sanitizer racecheck"]["error"]
    assert error == "exit code 99 | ========= ERROR SUMMARY"

    code, records = run(folder, "--only", "toy", "--seconds", "0.01")
    assert code == 1
    assert records["toy"]["error"].startswith("stopped after 0.01 s")
