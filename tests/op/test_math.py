"""The vectorizable exp and GELU, compiled and compared with float64."""

import functools
import math

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.ir import IRModule
from tvm.script import tirx as T

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import math as fast
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.targets import resolve_target

COUNT = 2**18


def evaluate(function, values):
    count, dtype = len(values), str(values.dtype)

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle):
        A = T.match_buffer(a, (count,), dtype, align=4)
        B = T.match_buffer(b, (count,), dtype, align=4)
        for i in range(count):
            with T.sblock("map"):
                v = T.axis.S(count, i)
                B[v] = function(A[v])

    schedule = tvm.s_tir.Schedule(main)
    (loop,) = schedule.get_loops(schedule.get_sblock("map"))
    schedule.vectorize(schedule.split(loop, [None, 16])[1])
    executable = tvm.compile(IRModule({"main": schedule.mod["main"]}), target=resolve_target())
    out = np.full_like(values, np.nan)
    executable["main"](tensors.to_kernel(values), tensors.to_kernel(out))
    return out, executable


def gelu(x):
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def test_exp_error_bound():
    x = np.linspace(-86.5, 88.7, COUNT, dtype=np.float32)
    y, _ = evaluate(fast.exp, x)
    error = np.abs(y / np.exp(x.astype(np.float64)) - 1.0)
    assert error.max() < fast.EXP_RELATIVE_ERROR


def test_exp_of_nonpositive_error_bound():
    x = np.linspace(-87.0, 0.0, COUNT, dtype=np.float32)
    y, _ = evaluate(fast.exp_of_nonpositive, x)
    error = np.abs(y / np.exp(x.astype(np.float64)) - 1.0)
    assert error.max() < fast.EXP_RELATIVE_ERROR
    limits, _ = evaluate(fast.exp_of_nonpositive, np.float32([0, -90, -np.inf, np.nan] * 4))
    assert limits[0] == 1
    assert np.all(limits[1:3] == y[0])
    assert np.isnan(limits[3])


def test_gelu_error_bound():
    x = np.linspace(-8.0, 8.0, COUNT, dtype=np.float32)
    y, _ = evaluate(fast.gelu, x)
    assert np.abs(y - gelu(x.astype(np.float64))).max() < fast.GELU_ABSOLUTE_ERROR
    y, _ = evaluate(functools.partial(fast.gelu, stored="bfloat16"), x)
    assert np.abs(y - gelu(x.astype(np.float64))).max() < fast.GELU_ABSOLUTE_ERROR_BFLOAT16


def test_special_values():
    x = np.array([0.0, -0.0, 100.0, -100.0, 3e38, -1e38, np.nan, np.inf, -np.inf] + [1.0] * 7)
    x = x.astype(np.float32)
    y, _ = evaluate(fast.exp, x)
    expected = [1.0, 1.0, np.inf, 0.0, np.inf, 0.0, np.nan, np.inf, 0.0]
    np.testing.assert_array_equal(y[:9], np.float32(expected))
    y, _ = evaluate(fast.gelu, x[:7].repeat(16))
    np.testing.assert_array_equal(y[::16][[0, 1, 2, 3, 5, 6]], [0, 0, 100, 0, 0, np.nan])
    y, _ = evaluate(functools.partial(fast.gelu, stored="bfloat16"), x[:7].repeat(16))
    bound = fast.GELU_ABSOLUTE_ERROR_BFLOAT16
    expected = np.float32([0, 0, 100, 0, 3e38, 0, np.nan])
    np.testing.assert_allclose(y[::16], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["exp", "gelu"])
def test_vectorizes_without_library_calls(name):
    _, executable = evaluate(getattr(fast, name), np.zeros(64, np.float32))
    source = executable.mod.inspect_source("ll")
    assert "expf" not in source
    assert "erff" not in source
    assert "<16 x float>" in source


@pytest.mark.parametrize(("function", "reference"), [(fast.exp, np.exp), (fast.gelu, gelu)])
def test_float64(function, reference):
    x = np.linspace(-5.0, 5.0, 64)
    y, _ = evaluate(function, x)
    np.testing.assert_allclose(y, reference(x), rtol=1e-14, atol=1e-15)


def test_unsupported_type_raises():
    with pytest.raises(InvalidArgumentError, match="got float16"):
        fast.exp(tirx.Var("x", "float16"))
