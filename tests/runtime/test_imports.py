"""Loading a model without PyTorch and TVM, and next to both."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest


def run(*code: str, arguments: tuple[Path, ...] = (), **environment: str) -> str:
    script = "\n".join(textwrap.dedent(part) for part in code)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,  # TVM's threads spin while they wait, which is slow on a busy machine.
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def files(toy, artifact_path, tmp_path, image) -> tuple[Path, Path, Path]:
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "expected.npy", toy.main(image))
    return artifact_path, tmp_path / "image.npy", tmp_path / "expected.npy"


BLOCK_IMPORTS = """
    import importlib.abc, sys

    class Block(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"torch", "tvm", "safetensors"}:
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Block())
"""
LOAD = """
    import sys
    import numpy as np
    from dcnv3_tvm import runtime

    model = runtime.load(sys.argv[1], threads=2)
    image, expected = np.load(sys.argv[2]), np.load(sys.argv[3])
    assert np.array_equal(model(image), expected)
    assert len(model.features(image)) == 2
"""
MAPPED = """
    lines = open("/proc/self/maps").read().splitlines()
    mapped = {line.split()[-1] for line in lines if line.endswith("libtvm_runtime.so")}
"""


def test_without_torch_and_tvm_the_bundled_library_is_loaded(files):
    mapped = run(BLOCK_IMPORTS, LOAD, MAPPED, "print(mapped)", arguments=files).strip()
    assert mapped == str({str(files[0] / "libtvm_runtime.so")})


def test_torch_and_tvm_are_not_imported(files):
    unwanted = "assert not {'torch', 'tvm', 'PIL', 'safetensors'} & set(sys.modules)"
    run(LOAD, unwanted, arguments=files)


def test_runtime_imports_neither_torch_nor_tvm():
    run("import sys, dcnv3_tvm.runtime; assert not {'torch', 'tvm', 'tvm_ffi'} & set(sys.modules)")


AFTER = """
    import torch
    from tvm import relax
    import tvm
    assert np.array_equal(model(image), expected)
    assert np.array_equal(model(torch.from_numpy(image)).numpy(), expected)
    machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1] + "/model.so"), tvm.cpu())
    assert machine["main"] is not None
"""


def test_tvm_and_torch_imported_afterwards(files):
    assert run(LOAD, AFTER, MAPPED, "print(len(mapped))", arguments=files).strip() == "1"


@pytest.mark.parametrize("first", ["import torch, tvm", "import tvm, torch"])
def test_tvm_imported_before(files, first):
    assert run(first, LOAD, MAPPED, "print(len(mapped))", arguments=files).strip() == "1"


def test_tvm_runtime_only(files):
    run("import tvm", LOAD, arguments=files, TVM_USE_RUNTIME_LIB="1")


def test_threads_of_the_environment(files):
    show = "print(runtime.load(sys.argv[1]).threads)"
    # One thread, because TVM's threads spin while they wait.
    found = run(LOAD, show, arguments=files, TVM_NUM_THREADS="1", OMP_NUM_THREADS="2")
    assert found.strip() == "1"
    found = run(LOAD, show, arguments=files, TVM_NUM_THREADS="", OMP_NUM_THREADS="1")
    assert found.strip() == "1"


FORK_AND_EXIT = """
    import os, time
    time.sleep(0.3)  # TVM's threads stop spinning, and sleep.
    child = os.fork()
    assert np.array_equal(model(image), expected)
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
CALLS_OF_A_DAEMON = """
    import itertools, threading
    threading.Thread(target=lambda: [model(image) for _ in itertools.count()], daemon=True).start()
"""


def test_exit_of_a_forked_child_and_during_calls(files):
    assert run(LOAD, FORK_AND_EXIT, CALLS_OF_A_DAEMON, arguments=files).strip() == "0"


def test_missing_pillow(files):
    code = """
    import sys
    sys.modules["PIL"] = None
    from dcnv3_tvm import errors, runtime
    try:
        runtime.load(sys.argv[1]).preprocess("photo.jpg")
    except errors.MissingDependencyError as error:
        print(error)
    """
    assert "pip install pillow" in run(code, arguments=files)
