import numpy as np
import pytest
import tvm
from tvm.target import Target

from dcnv3_tvm.compiler.cuda import device_pipeline
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.tolerances import LAYER


@pytest.fixture(scope="session")
def host():
    return resolve_target()


@pytest.fixture(scope="session", params=["auto", "cpu-haswell", "cpu-x86-64"])
def target(request):
    """Return this machine's target, and those of older CPUs whose code it runs."""
    target = resolve_target(request.param)
    if request.param != "auto" and "avx2" not in str(
        tvm.target.codegen.llvm_get_cpu_features(resolve_target())
    ):
        pytest.skip("not an x86 machine with AVX2")
    return target


@pytest.fixture
def cuda_code():
    """Return the CUDA code of a scheduled function."""

    def generate(func, target: Target):
        module = tvm.IRModule({"main": tensorize(func).with_attr("global_symbol", "main")})
        with device_pipeline.lowering():
            built = tvm.compile(module, target=target, tir_pipeline=device_pipeline.PIPELINE)
        (code,) = device_pipeline.cuda_sources(built.mod)
        return code[code.index('extern "C" __global__') :]

    return generate


@pytest.fixture
def assert_close():
    def check(result, reference, dtype="float32", name=""):
        limit = LAYER[dtype] * max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(
            result.astype("float64"), reference, rtol=0, atol=limit, err_msg=name
        )

    return check


@pytest.fixture
def run_together(gpu):
    """Compile kernels for a GPU together; yield the name, result and expected value of each.

    Problems by name are ``(scheduled kernel, inputs, (shape, dtype) of the output, expected)``.
    """

    def run(target: Target, problems):
        functions = {name: function for name, (function, *_) in problems.items()}
        cases = {name: (inputs, [output]) for name, (_, inputs, output, _) in problems.items()}
        for name, (result,) in gpu.run_all(functions, target, cases).items():
            yield name, result, problems[name][-1]

    return run


@pytest.fixture
def check_together(run_together, assert_close):
    """Run problems of `run_together` and compare their results with the expected values."""

    def check(target: Target, problems):
        for name, result, expected in run_together(target, problems):
            assert_close(result, expected, str(result.dtype), name)

    return check
