"""Register tiles for the vector unit of a CPU target."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.kernels.matmul import ROW_SLACK, constant_factor, needs_slack
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import vector_bits

RESIDENT_WEIGHTS: Final = 512 * 1024
"""Bytes of weights that may be read again for every row tile: they stay in the L2 cache."""


CACHE_WAY: Final = 4096
"""Bytes of one way of the L1 data cache, on all x86-64 processors with at least AVX."""

CACHE_WAYS: Final = 8
"""Ways of the L1 data cache; newer processors have more."""


@dataclasses.dataclass(frozen=True)
class VectorUnit:
    """Vector registers of a target.

    Parameters
    ----------
    bits : int
        Width of a register.
    registers : int
        Number of registers.
    """

    bits: int
    registers: int

    def lanes(self, dtype: str) -> int:
        """Return the number of elements a register holds."""
        return self.bits // (64 if dtype == "float64" else 32)


def vector_unit(target: Target) -> VectorUnit:
    """Describe the vector unit that code for `target` may use."""
    bits = vector_bits(target)
    arm = str(target.attrs.get("mtriple", "")).startswith(("aarch64", "arm64"))
    return VectorUnit(bits=bits, registers=32 if arm or bits == 512 else 16)


def weight_tile_width(out_features: int, target: Target, dtype: str = "float32") -> int:
    """Return the columns of a register tile: two vectors, or one for a narrow product."""
    lanes = vector_unit(target).lanes(dtype)
    return lanes if out_features <= lanes else 2 * lanes


def weights_stay_cached(weight: Any) -> bool:
    """Whether packed weights are small enough to be read again for every row tile."""
    sizes = [size for size in map(static, weight.shape) if size is not None]
    return math.prod(sizes) * DTYPE_BYTES[str(weight.dtype)] <= RESIDENT_WEIGHTS


def tile_columns(sch: s_tir.Schedule, column: LoopRV, weight: Any) -> int:
    """Return the columns of a register tile: those of a weight tile, or the few there are."""
    tile = weight.shape[-2 if str(weight.dtype) == "bfloat16" else -1]
    sizes = (static(sch.get(column).extent), static(tile))
    return min(size for size in sizes if size is not None)


def row_tile(
    rows: Any, columns: int, unit: VectorUnit, dtype: str, row_bytes: int | None = None
) -> int:
    """Return the rows of a register tile with `columns` columns.

    As many as the registers hold beside one row of weights and one broadcast; another number where
    that divides the rows and makes every tile whole. Rows at a distance of whole pages all fall
    into one set of the L1 cache: then no more than it keeps.

    Parameters
    ----------
    rows : int or expression
        Rows of the product. Of a symbolic number only the constant factor is known.
    columns : int
        Columns of the tile.
    unit : VectorUnit
        Registers to fill.
    dtype : str
        Element type.
    row_bytes : int, optional
        Distance of neighbouring rows in memory.
    """
    most = max(1, min(unspilled_rows(columns, unit, dtype), ROW_SLACK + 1))
    if row_bytes is not None:
        sets = CACHE_WAY // math.gcd(row_bytes, CACHE_WAY)
        most = min(most, sets * CACHE_WAYS)
    known = static(rows)
    if known is not None and known <= most:
        return known
    factor = known if known is not None else constant_factor(rows)
    larger = (size for size in range(most + 1, ROW_SLACK + 2) if factor % size == 0)
    # A few spilled sums are better than tiles of two sizes.
    return whole_tile(factor, most) or next(larger, most)


def unspilled_rows(columns: int, unit: VectorUnit, dtype: str) -> int:
    """Return the rows whose sums fit registers beside a row of weights and one broadcast."""
    vectors = -(-columns // unit.lanes(dtype))
    return (unit.registers - vectors - 1) // vectors


def row_tiles(rows: Any) -> list[int]:
    """List the rows of register tiles, all whole, among which a tuner may choose."""
    known = static(rows)
    if known is None:
        return []
    sizes = range(1, min(known, ROW_SLACK + 1) + 1)
    return [size for size in sizes if needs_slack(known) or known % size == 0]


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`."""
    return max(size for size in range(1, most + 1) if number % size == 0)


def numbered(name: str, index: int) -> str:
    """Name a decision of the part `index` of a kernel, of which the first bears the plain name."""
    return f"{name}_{index}" if index else name


def unrolled_depth(
    sch: s_tir.Schedule, depth: LoopRV, space: SearchSpace, index: int = 0, *, spilled: bool = False
) -> list[LoopRV]:
    """Split off the steps of a reduction loop that are unrolled: one, if a tuner wants no more.

    Where sums are spilled, as many as four: they are then loaded and stored once for all of them.
    """
    extent = static(sch.get(depth).extent) or 1
    fitting = [steps for steps in (1, 2, 4, 8) if extent % steps == 0]
    default = max(steps for steps in fitting if steps <= 4) if spilled else 1
    steps = space.pick(numbered("unroll", index), fitting, default)
    split: list[LoopRV] = sch.split(depth, [None, steps])
    return split


def whole_tile(extent: int, most: int) -> int | None:
    """Return the largest divisor of `extent` up to `most` that is not wastefully small."""
    least = 4 if most < 12 else 5
    for size in range(most, least - 1, -1):
        if extent % size == 0:
            return size
    return None


def matmul_blocks(sch: s_tir.Schedule) -> list[tuple[SBlockRV, SBlockRV]]:
    """Return the pairs (sums, epilogue) of blocks of a kernel of `dcnv3_tvm.kernels.matmul`."""
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    sums = [block for block in blocks if sch.get(block).name_hint.startswith("sums")]
    return [(block, sch.get_consumers(block)[0]) for block in sums]


def accumulate_tile(
    sch: s_tir.Schedule, sums: SBlockRV, tile: Sequence[LoopRV], reduction: LoopRV
) -> None:
    """Run the sums of a register tile side by side: rows unrolled, columns in vectors.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    sums : SBlockRV
        Reduction block.
    tile : sequence of LoopRV
        Innermost loops, the last one over the columns.
    reduction : LoopRV
        Outermost reduction loop, around the tile.
    """
    for loop in tile[:-1]:
        sch.unroll(loop)
    sch.vectorize(tile[-1])
    sch.decompose_reduction(sums, reduction)


def copy_in_task(sch: s_tir.Schedule, block: SBlockRV, task: LoopRV, lanes: int) -> None:
    """Compute an elementwise block at `task`, for what the task needs of it."""
    sch.compute_at(block, task, preserve_unit_loops=True)
    vectorize_innermost(sch, block, lanes)


def copy_in_parallel(sch: s_tir.Schedule, block: SBlockRV, lanes: int) -> None:
    """Compute an elementwise block of at least two dimensions beforehand, on all cores."""
    first, second, *_ = sch.get_loops(block)
    sch.parallel(sch.fuse(first, second))
    vectorize_innermost(sch, block, lanes)


def vector_width(extent: int | None, lanes: int) -> int:
    """Return the widest vector, up to `lanes`, that divides a loop's extent; 1 for none."""
    return 1 if extent is None else math.gcd(extent, 1 << (lanes.bit_length() - 1))


def vectorize_innermost(sch: s_tir.Schedule, block: SBlockRV, lanes: int) -> None:
    """Run the innermost loop of a block in the widest vectors that divide it."""
    loop = sch.get_loops(block)[-1]
    width = vector_width(static(sch.get(loop).extent), lanes)
    if width > 1:
        sch.vectorize(sch.split(loop, [None, width])[1])
