"""Register tiles of matmuls and convolutions on CPUs: rows, columns and unrolled depth."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.op.expr import constant_factor, static
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import is_aarch64, vector_bits

MAX_ROWS: Final = 16
"""Most rows of a register tile."""

_PARTIAL_TILE_VECTORS: Final = 14
"""Most vectors of sums in a register tile of which the last may be partial. Each row has an address
register then, because the last row stands for those beyond it; and fewer rows are wasted."""

SPILLED_STEPS: Final = 4
"""Steps of K that are unrolled if sums spill: they are loaded and stored once for all steps."""

_L2_WEIGHT_BYTES: Final = 512 * 1024
"""Bytes of weights that stay in the L2 cache."""

_L1_WAY_BYTES: Final = 4096
"""Bytes of one way of the L1 data cache of all x86-64 CPUs with AVX."""

_L1_WAYS: Final = 8
"""Ways of the L1 data cache; newer CPUs have more."""


@dataclasses.dataclass(frozen=True)
class VectorUnit:
    """Vector registers of a target.

    Parameters
    ----------
    bits : int
        Width of a register.
    registers : int
        Number of registers.
    by_lane : bool
        Whether multiply-adds take one factor from any lane of a vector (AArch64).
    """

    bits: int
    registers: int
    by_lane: bool = False

    def lanes(self, dtype: str) -> int:
        """Return the elements of a register."""
        return self.bits // (64 if dtype == "float64" else 32)


def vector_unit(target: Target) -> VectorUnit:
    """Return the vector unit of a CPU target."""
    bits = vector_bits(target)
    arm = is_aarch64(target)
    return VectorUnit(bits=bits, registers=32 if arm or bits == 512 else 16, by_lane=arm)


def weight_tile_width(out_features: int, target: Target) -> int:
    """Return the columns of a weight tile: two vectors, or one if the matmul has no more."""
    lanes = vector_unit(target).lanes("float32")
    return lanes if out_features <= lanes else 2 * lanes


def row_slack(rows: Any) -> int:
    """Return the extra rows for a kernel none of whose row tiles of at least 5 rows is whole.

    With ``MAX_ROWS - 1`` rows computed beyond the last, every row tile is whole.

    Parameters
    ----------
    rows : int or expression
        Rows of the matmul, or pixels of an output row. Of a dynamic number only the constant
        factor is used.
    """
    constant = static(rows)
    if constant is not None and constant < MAX_ROWS:
        return 0
    factor = constant if constant is not None else constant_factor(rows)
    divides = any(factor % tile == 0 for tile in range(5, MAX_ROWS + 1))
    return 0 if divides else MAX_ROWS - 1


def weights_stay_cached(weight: Any) -> bool:
    """Whether packed weights fit the L2 cache, so that each row tile may read all of them."""
    sizes = [size for size in map(static, weight.shape) if size is not None]
    return math.prod(sizes) * DTYPE_BYTES[str(weight.dtype)] <= _L2_WEIGHT_BYTES


def tile_columns(sch: s_tir.Schedule, column: LoopRV, weight: Any) -> int:
    """Return the columns of a register tile: those of a weight tile, or all if there are fewer."""
    tile = weight.shape[-2 if str(weight.dtype) == "bfloat16" else -1]
    sizes = (static(sch.get(column).extent), static(tile))
    return min(size for size in sizes if size is not None)


def row_tile(
    rows: Any, columns: int, unit: VectorUnit, dtype: str, row_bytes: int | None = None
) -> int:
    """Return the rows of a register tile with `columns` columns.

    As many as fit the registers next to one row of weights and one broadcast value, or a similar
    number that divides `rows`. Rows whose distance is a multiple of a cache way map to the same set
    of the L1 cache, which limits them to its associativity.

    Parameters
    ----------
    rows : int or expression
        Rows of the matmul. Of a dynamic number only the constant factor is used.
    columns : int
        Columns of the tile.
    unit : VectorUnit
        Vector registers of the target.
    dtype : str
        Element type.
    row_bytes : int, optional
        Distance of neighbouring rows in memory, in bytes.
    """
    most = max(1, min(unspilled_rows(columns, unit, dtype), MAX_ROWS))
    if row_bytes is not None:
        sets = _L1_WAY_BYTES // math.gcd(row_bytes, _L1_WAY_BYTES)
        most = min(most, sets * _L1_WAYS)
    known = static(rows)
    if known is not None and known <= most:
        return known
    factor = known if known is not None else constant_factor(rows)
    larger = (size for size in range(most + 1, MAX_ROWS + 1) if factor % size == 0)
    vectors = -(-columns // unit.lanes(dtype))
    partial = min(most, max(1, _PARTIAL_TILE_VECTORS // vectors))
    # Spilling a few sums is faster than tiles of two sizes.
    return whole_tile(factor, most) or next(larger, partial)


def unspilled_rows(columns: int, unit: VectorUnit, dtype: str) -> int:
    """Return the rows whose sums fit the registers next to weights and a value of x.

    That is a row of weights, or the rows that are multiplied by the lanes of a vector of x.
    """
    vectors = -(-columns // unit.lanes(dtype))
    weights = vectors * (unit.lanes(dtype) if unit.by_lane else 1)
    return (unit.registers - weights - 1) // vectors


def row_tiles(rows: Any) -> list[int]:
    """Return the candidates for the rows of a register tile, with which all tiles are whole."""
    known = static(rows)
    if known is None:
        return []
    sizes = range(1, min(known, MAX_ROWS) + 1)
    return [size for size in sizes if row_slack(known) or known % size == 0]


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`."""
    return max(size for size in range(1, most + 1) if number % size == 0)


def numbered(name: str, index: int) -> str:
    """Return the name of a decision of part `index` of a kernel; the first has no suffix."""
    return f"{name}_{index}" if index else name


def unrolled_depth(
    sch: s_tir.Schedule, depth: LoopRV, space: SearchSpace, index: int = 0, *, most: int = 1
) -> list[LoopRV]:
    """Split off the unrolled steps of the loop over K: by default those up to `most` that fit."""
    extent = static(sch.get(depth).extent) or 1
    fitting = [steps for steps in (1, 2, 4, 8) if extent % steps == 0]
    default = max(steps for steps in fitting if steps <= most)
    steps = space.pick(numbered("unroll", index), fitting, default)
    split: list[LoopRV] = sch.split(depth, [None, steps])
    return split


def whole_tile(extent: int, most: int) -> int | None:
    """Return the largest divisor of `extent` up to `most` that is at least 4 or 5, or None."""
    least = 4 if most < 12 else 5
    for size in range(most, least - 1, -1):
        if extent % size == 0:
            return size
    return None


def matmul_blocks(sch: s_tir.Schedule) -> list[tuple[SBlockRV, SBlockRV]]:
    """Return the pairs (sums, epilogue) of blocks of a matmul or convolution."""
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    sums = [block for block in blocks if sch.get(block).name_hint.startswith("sums")]
    return [(block, sch.get_consumers(block)[0]) for block in sums]
