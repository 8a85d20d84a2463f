"""The library imports no more than it needs, and says which package it lacks."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "use",
    [
        "import dcnv3_tvm; dcnv3_tvm.DCNv3Spec.of((1, 4, 4, 8), group=2)",
        "from dcnv3_tvm import frontend; frontend.list_models()",
        "from dcnv3_tvm.cli import main; main(['models'])",
    ],
)
def test_neither_torch_nor_tvm_is_imported(use: str):
    assert run(f"import sys; {use}; print({{'torch', 'tvm'}} & set(sys.modules))").endswith(
        "set()\n"
    )


def test_a_missing_pytorch_is_named():
    said = run(
        "import sys; sys.modules['torch'] = None\n"
        "from dcnv3_tvm import errors, frontend\n"
        "try:\n"
        "    frontend.create_model\n"
        "except errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert "needs torch" in said
    assert "pip install 'dcnv3-tvm[torch]'" in said


@pytest.mark.parametrize(
    "use",
    [
        "dt.compile_model",
        "dt.compile_op(dt.DCNv3Spec.of((1, 4, 4, 4), group=1))",
        "dt.dcnv3(*(np.ones((1, 4, 4, c), 'float32') for c in (4, 18, 9)), group=1)",
    ],
)
def test_a_missing_tvm_is_named(use: str):
    said = run(
        "import sys; sys.modules['tvm'] = None\n"
        "import numpy as np, dcnv3_tvm as dt\n"
        "from dcnv3_tvm import errors\n"
        "try:\n"
        f"    {use}\n"
        "except errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert "pip install apache-tvm==" in said
