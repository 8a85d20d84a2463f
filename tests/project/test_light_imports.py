"""Optional and heavy packages are imported only where they are needed."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import dcnv3_tvm",
        "import dcnv3_tvm; dcnv3_tvm.DCNv3Spec.of((1, 4, 4, 8), group=2)",
        "from dcnv3_tvm import frontend; frontend.list_models()",
        "from dcnv3_tvm.cli import main; main(['models'])",
        "from dcnv3_tvm.cli import main; main(['--help'])",
    ],
    ids=["import", "spec", "list_models", "models", "help"],
)
def test_torch_and_tvm_are_not_imported(statement: str):
    show = "atexit.register(lambda: print({'torch', 'tvm'} & set(sys.modules)))"
    assert run(f"import atexit, sys; {show}; {statement}").endswith("set()\n")


def test_missing_torch_is_named():
    message = run(
        "import sys; sys.modules['torch'] = None\n"
        "from dcnv3_tvm import errors, frontend\n"
        "try:\n"
        "    frontend.create_model\n"
        "except errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert "needs torch" in message
    assert 'pip install "dcnv3-tvm[torch]"' in message


@pytest.mark.parametrize(
    "statement",
    [
        "dt.compile_model",
        "dt.compile_op(dt.DCNv3Spec.of((1, 4, 4, 4), group=1))",
        "dt.dcnv3(*(np.ones((1, 4, 4, c), 'float32') for c in (4, 18, 9)), group=1)",
    ],
    ids=["compile_model", "compile_op", "dcnv3"],
)
def test_missing_tvm_is_named(statement: str):
    message = run(
        "import sys; sys.modules['tvm'] = None\n"
        "import numpy as np, dcnv3_tvm as dt\n"
        "from dcnv3_tvm import errors\n"
        "try:\n"
        f"    {statement}\n"
        "except errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert "needs TVM's compiler" in message
    assert 'which is not installed. Run: pip install "apache-tvm-ffi' in message
    assert " apache-tvm==" in message
