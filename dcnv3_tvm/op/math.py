"""exp and GELU as TensorIR expressions that LLVM vectorizes.

They replace ``tirx.exp`` and ``tirx.erf`` for LLVM targets (see tvm_workarounds: libm-calls). The
float32 expressions consist of additions, multiplications, selects and one integer shift,
which become vector instructions.

The polynomials are minimax approximations, computed in float64 by iteratively reweighted least
squares on Chebyshev nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx

from dcnv3_tvm.errors import InvalidArgumentError

EXP_RELATIVE_ERROR: Final = 2.0e-7
"""Bound on the relative error of `exp` in float32, where the result is at least 2**-125."""

GELU_ABSOLUTE_ERROR: Final = 3.0e-7
"""Bound on the absolute error of `gelu` in float32 for ``x <= 8``; for larger x it returns x."""

GELU_ABSOLUTE_ERROR_BFLOAT16: Final = 1.8e-4
"""Bound on the absolute error of `gelu` for bfloat16; for ``x > 3.95`` it returns x.

For normally distributed x, rounding the result is 9 times as inexact, in root mean square.
"""

# e**r for |r| <= ln(2)/2, with a relative error of 1.9e-9.
_EXP: Final = (
    1.0000000005546097,
    1.000000036344733,
    0.4999999207504763,
    0.16666420072060384,
    0.04166822619856306,
    0.008374824054459974,
    0.0013836835225095557,
)
# ln 2 as the sum of two numbers; the first has 9 bits, so n times it is exact for any exponent n.
_LN2_HIGH: Final = 355.0 / 512.0
_LN2_LOW: Final = 0.6931471805599453 - _LN2_HIGH
# Below, the result flushes to zero; above, it overflows to infinity.
_EXP_LOW: Final = -86.5
_EXP_HIGH: Final = 88.72283

# Of the float32 numbers from 2**23 to 2**24, which are integers, the middle one.
_ROUND: Final = 1.5 * 2**23
_ROUND_BITS: Final = 0x4B400000

# With a = min(|x|, _GELU_END), gelu(x) = max(x, 0) - a*polynomial(a)**8, or 0 below -_GELU_END. The
# eighth root of a function like exp(-a**2/2) needs a polynomial of half the degree.
_GELU_END: Final = 5.5
_GELU: Final = (
    0.9170040083932858,
    -0.09145741492180526,
    -0.03192807692133676,
    -0.0006719557221102983,
    0.0015043623802047305,
    3.429502551261704e-05,
    -6.02576363293703e-05,
    7.479553032384065e-06,
    -2.958819269264092e-07,
)

# For bfloat16: with a = min(|x|, _GELU_END_BFLOAT16), gelu(x) = max(x, 0) - a*polynomial(a).
_GELU_END_BFLOAT16: Final = 3.95
_GELU_BFLOAT16: Final = (
    0.499951672975355,
    -0.3881882391545667,
    -0.04720067909579625,
    0.1433897059755629,
    -0.05892086466454437,
    0.0101863609058305,
    -0.0006631156978101492,
)


def exp(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Build e**x.

    Parameters
    ----------
    x : tvm.tirx.PrimExpr
        float32 or float64. The result repeats the expression, which should be a load or a variable.
        float64 calls the C library.

    Returns
    -------
    tvm.tirx.PrimExpr
        Of the type of `x`. In float32, the relative error is below `EXP_RELATIVE_ERROR`, the result
        for ``x < -86.5`` is 0, infinities give 0 and infinity, and NaN gives NaN.
    """
    if _type(x) == "float64":
        return tirx.exp(x)
    x_log2 = x * _real(1.4426950408889634)
    exponent = tirx.min(tirx.max(x_log2, _real(-126.0)), _real(128.0))
    n = tirx.floor(exponent + _real(0.5))
    rest = (x - n * _real(_LN2_HIGH)) - n * _real(_LN2_LOW)
    # 2**(n - 1) times twice the polynomial, because 2**128 overflows float32.
    bits = tirx.shift_left(tirx.Cast("int32", n) + _int(126), _int(23))
    power = tirx.reinterpret("float32", bits)
    value = _horner(rest, [2.0 * c for c in _EXP]) * power
    value = tirx.Select(x > _real(_EXP_HIGH), _real(float("inf")), value)
    return tirx.Select(x < _real(_EXP_LOW), _real(0.0), value)


def exp_of_nonpositive(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Build e**x for x <= 0, as in a softmax, in two thirds of the operations of `exp`.

    Parameters
    ----------
    x : tvm.tirx.PrimExpr
        As for `exp`.

    Returns
    -------
    tvm.tirx.PrimExpr
        As for `exp`; but for ``x < -87``, also -infinity, the result in float32 is e**-87.
    """
    if _type(x) == "float64":
        return tirx.exp(x)
    # In this order, the maximum of NaN and a number is NaN on CPUs.
    bounded = tirx.max(_real(-87.0), x)
    # The sum has no bits for fractions, so that it ends in the nearest integer n.
    rounded = bounded * _real(1.4426950408889634) + _real(_ROUND)
    # TVM would simplify (y + c) - c to y.
    n = rounded - tirx.reinterpret("float32", _int(_ROUND_BITS))
    rest = (bounded - n * _real(_LN2_HIGH)) - n * _real(_LN2_LOW)
    power = tirx.shift_left(tirx.reinterpret("int32", rounded), _int(23)) + _int(127 << 23)
    return _horner(rest, _EXP) * tirx.reinterpret("float32", power)


def gelu(x: tirx.PrimExpr, *, stored: str = "float32") -> tirx.PrimExpr:
    """Build the exact (erf) GELU, ``x/2 * (1 + erf(x / sqrt 2))``.

    ``max(x, 0) - gelu(x)`` is even in x, at most 0.17, and below 1.1e-7 for |x| >= 5.5: one
    polynomial on [0, 5.5] approximates it, without division or cancellation.

    Parameters
    ----------
    x : tvm.tirx.PrimExpr
        float32 or float64. The result repeats the expression, which should be a load or a variable.
        float64 calls the C library's erf.
    stored : str
        Element type to which the result is rounded. For bfloat16 it is computed with fewer digits.

    Returns
    -------
    tvm.tirx.PrimExpr
        Of the type of `x`. In float32, the absolute error is below `GELU_ABSOLUTE_ERROR`, for
        bfloat16 below `GELU_ABSOLUTE_ERROR_BFLOAT16`; 0 gives 0 and NaN gives NaN.
    """
    if _type(x) == "float64":
        half, root = tirx.const(0.5, "float64"), tirx.const(0.7071067811865476, "float64")
        return x * half * (tirx.const(1.0, "float64") + tirx.erf(x * root))
    magnitude = tirx.abs(x)
    if stored == "bfloat16":
        a = tirx.min(magnitude, _real(_GELU_END_BFLOAT16))
        # Not `tirx.max`, which would lose NaN.
        relu = tirx.Select(x < _real(0.0), _real(0.0), x)
        return relu - a * _horner(a, _GELU_BFLOAT16)
    a = tirx.min(magnitude, _real(_GELU_END))
    # In this order, the maximum of zero and NaN is NaN on CPUs.
    relu = tirx.max(_real(0.0), x)
    root = _horner(a, _GELU)
    for _ in range(3):
        root = root * root
    return tirx.Select(x < _real(-_GELU_END), _real(0.0), relu - a * root)


def _type(x: tirx.PrimExpr) -> str:
    dtype = str(x.ty.dtype)
    if dtype not in ("float32", "float64"):
        raise InvalidArgumentError(
            "the function is not available for this type",
            got=dtype,
            allowed="float32, float64",
            hint='Cast to float32 first: tirx.Cast("float32", x).',
        )
    return dtype


def _real(value: float) -> Any:
    return tirx.const(value, "float32")


def _int(value: int) -> Any:
    return tirx.const(value, "int32")


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    value = _real(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + _real(coefficient)
    return value
