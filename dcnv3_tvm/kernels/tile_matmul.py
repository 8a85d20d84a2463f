"""Matmul of bfloat16 in blocks of sums, its epilogue in the same kernel, for CPUs with AMX.

Blocks are computed by functions of `dcnv3_tvm.kernels.tile_functions`.

Where rows, columns or depth are no multiple of a block, the last block begins earlier and overlaps
the one before: these sums are computed twice, with the same result, and the weights of what was
multiplied before are zero. So all blocks are of one size, and nothing outside the operands is read
or written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from tvm import tirx
from tvm.sym import Analyzer
from tvm.tirx.script import builder as T

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.epilogue import DeclaredEpilogue, Epilogue, declare_epilogue
from dcnv3_tvm.kernels.packing import BLOCK, PAIR, TILE
from dcnv3_tvm.kernels.tile_functions import IMPORT_CODE, PORTABLE_CODE, SUM_BLOCK
from dcnv3_tvm.op.expr import cast, constant_factor, int64, product, static, unflatten
from dcnv3_tvm.op.prim_func_builder import allocate, argument, compute, function

KERNEL: Final = "tile_matmul"
"""Value of `dcnv3_tvm.op.expr.KERNEL_ATTR` of these kernels."""

OPERAND: Final = "bfloat16"
"""Element type of x and weight; sums are `ACCUMULATOR`."""

ACCUMULATOR: Final = "float32"


_LINE: Final = 64
"""Bytes of a cache line."""

_STEP_LINES: Final = BLOCK * BLOCK * DTYPE_BYTES[OPERAND] // _LINE
"""Cache lines of the weights of a step."""

_LEAST_ROWS: Final = BLOCK - BLOCK // 8
"""Rows of a block that divides the rows of a matmul."""

_MANY: Final = 16
"""Blocks of which one more or less hardly matters to a thread."""


def supports_tiles(in_features: int, out_features: int) -> bool:
    """Whether a matmul has at least one block of depth and of columns."""
    return min(in_features, out_features) >= BLOCK


def has_many_weights(in_features: int, out_features: int) -> bool:
    """Whether weights are more than x and the result for an image of 224 x 224 pixels."""
    return in_features * out_features > 240 * (in_features + out_features)


@functools.lru_cache(maxsize=256)
def tile_matmul(
    lead: Sequence[Any],
    in_features: int,
    out_features: int,
    *,
    epilogue: Epilogue | None = None,
    out_dtype: str = ACCUMULATOR,
) -> tirx.PrimFunc:
    """Build ``out = epilogue(x @ weight.T)``.

    Parameters
    ----------
    lead : sequence of int or tirx.Var
        Leading dimensions of x and out.
    in_features, out_features : int
        K and N, at least `dcnv3_tvm.kernels.packing.BLOCK`.
    epilogue : Epilogue, optional
        Applied before the store.
    out_dtype : str
        Element type of out, float32 or bfloat16; bias and residual are float32.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, K), weight (`packing.pack_tile_weight`), [bias (N,)],
        [residual (*lead, N)], out (*lead, N); unscheduled blocks ``sums`` over blocks of (rows,
        columns), and ``epilogue`` over these and (row, column) of a block, which only rounds to
        bfloat16 after a block ``finished``.

    Raises
    ------
    InvalidArgumentError
        If K or N is smaller than a block.
    """
    if not supports_tiles(in_features, out_features):
        raise InvalidArgumentError(
            "the matmul is smaller than a block",
            got=f"{in_features} input and {out_features} output features",
            allowed=f"at least {BLOCK}",
        )
    lead = [int64(size) for size in lead]
    rows = product(lead)
    # An even number of threads gets the same number of blocks each. Where the number is dynamic, a
    # task has four rows of blocks, or all of them for a few columns of many weights.
    multiple = 2 if static(rows) is not None or has_many_weights(in_features, out_features) else 4
    height = block_rows(rows, multiple=multiple)
    tile = (height + 1) // 2
    steps = -(-in_features // BLOCK)
    blocks = [count_blocks(rows, height, multiple=multiple), int64(-(-out_features // BLOCK))]

    def row(m: Any) -> Any:
        return block_start(m, height, rows)

    def column(n: Any) -> Any:
        return block_start(n, BLOCK, out_features)

    with function(KERNEL) as builder:
        x = argument("x", [*lead, in_features], OPERAND)
        weight = argument("weight", [blocks[1], steps, 2, TILE, TILE, PAIR], OPERAND)
        finish = declare_epilogue(
            epilogue or Epilogue(), [*lead, out_features], ACCUMULATOR, out_dtype
        )
        row_bytes = in_features * DTYPE_BYTES[OPERAND]
        add_blocks(
            blocks,
            height,
            BlockOperands(
                x,
                lambda m: (*unflatten(row(m), lead), 0),
                weight,
                row_bytes=int64(row_bytes),
                skip_bytes=(height - tile) * row_bytes,
                depth=in_features,
                tile_rows=tile,
                second=height - tile,
            ),
            finish,
            lambda m, n, i, j: [*unflatten(row(m) + i, lead), column(n) + j],
        )
    return builder.get()


class BlockOperands(NamedTuple):
    """Where a block of sums is computed from.

    Parameters
    ----------
    x : buffer
        The first operand, in `OPERAND`.
    position : callable
        Index of the first element that a row of blocks reads.
    weight : buffer
        Packed; its first axis is the column of blocks.
    row_bytes, skip_bytes : expression
        Bytes of x from one row of a tile to the next, and from the first tile to the second.
    depth : int
        Elements of a run.
    tile_rows, second : expression
        Rows of a tile, and rows of the sums from the first tile to the second.
    runs : int
        Runs along the depth.
    pitch_bytes : expression
        Bytes of x from one run to the next.
    """

    x: Any
    position: Callable[[Any], Sequence[Any]]
    weight: Any
    row_bytes: Any
    skip_bytes: Any
    depth: int
    tile_rows: Any
    second: Any
    runs: int = 1
    pitch_bytes: Any = 0


def add_blocks(
    blocks: Sequence[Any],
    height: Any,
    operands: BlockOperands,
    finish: DeclaredEpilogue,
    at: Callable[..., list[Any]],
) -> None:
    """Add the blocks ``sums``, ``finished`` for a bfloat16 output, and ``epilogue``.

    Parameters
    ----------
    blocks : sequence
        Numbers of rows and columns of blocks.
    height : expression
        Rows of a block.
    operands : BlockOperands
        What is multiplied.
    finish : DeclaredEpilogue
        Applied to the sums.
    at : callable
        Index in the output of (row of blocks, column of blocks, row, column).
    """
    x, weight = operands.x, operands.weight
    first = [0] * (len(weight.shape) - 1)
    last = (operands.depth - BLOCK) * DTYPE_BYTES[OPERAND]
    # All rows of blocks of an image together prefetch the weights of a column.
    parts = constant_factor(blocks[0])
    lines = -(-_STEP_LINES // parts)
    sums = allocate("sums", [*blocks, BLOCK, BLOCK], ACCUMULATOR)
    imported = T.serial(blocks[0], annotations={IMPORT_CODE: PORTABLE_CODE})
    with imported as outer, T.serial(blocks[1]) as inner, T.sblock("sums"):
        m = T.axis.spatial(blocks[0], outer, "int64")
        n = T.axis.spatial(blocks[1], inner, "int64")
        # Only the region of `sums` matters: x and weight may be read whole.
        T.reads(*(each[tuple(slice(0, size) for size in each.shape)] for each in (x, weight)))
        T.writes(sums[m, n, 0:BLOCK, 0:BLOCK])
        T.evaluate(
            tirx.call_extern(
                "int32",
                SUM_BLOCK,
                tirx.address_of(sums[m, n, 0, 0]),
                tirx.address_of(x[tuple(operands.position(m))]),
                int64(operands.row_bytes),
                int64(operands.skip_bytes),
                int64(operands.runs),
                int64(operands.pitch_bytes),
                tirx.address_of(weight[(n, *first)]),
                int64(-(-operands.depth // BLOCK)),
                int64(last),
                int64(operands.tile_rows),
                int64(operands.second),
                tirx.address_of(weight[(tirx.min(n + 1, blocks[1] - 1), *first)]),
                cast("int32", tirx.floormod(m, int64(parts))),
                int64(lines),
            )
        )
    extents = [*blocks, height, BLOCK]
    if finish.out.dtype == ACCUMULATOR:
        finish.store("", sums, extents, at)
        return
    # Apart, so that a schedule can round whole vectors.
    finished = compute(
        "finished",
        extents,
        lambda *index: finish.value(sums[index], at(*index)),
        dtype=ACCUMULATOR,
    )
    compute(
        "epilogue",
        extents,
        lambda *index: cast(OPERAND, finished[index]),
        dtype=OPERAND,
        into=finish.out,
        at=at,
    )


def block_rows(rows: Any, *, multiple: int = 1) -> Any:
    """Return the rows of a block: a divisor if one is large enough, else such that few overlap.

    Parameters
    ----------
    rows : int or expression
        Rows of the matmul, of which a dynamic number is a multiple of its constant factor.
    multiple : int
        Of which the number of blocks should be one, if it is small or dynamic.
    """
    least = constant_factor(rows)
    if static(rows) is None and least < _LEAST_ROWS:
        # No rows are no blocks, but divided by one.
        count = tirx.max(_dynamic_count(rows, multiple), int64(1))
        return tirx.min(_quotient(rows, count), int64(BLOCK))
    divisors = (size for size in range(BLOCK, _LEAST_ROWS - 1, -1) if least % size == 0)
    height = next(divisors, -(-least // -(-least // BLOCK)))
    number = -(-least // height)
    if 1 < number < _MANY:
        height = -(-least // (-(-number // multiple) * multiple))
    return int64(height)


def count_blocks(extent: Any, size: Any, *, multiple: int = 1) -> Any:
    """Return the number of blocks of a size, from `block_rows`, that cover an extent."""
    known, least = static(size), constant_factor(extent)
    if known is None:
        return _dynamic_count(extent, multiple)
    if known > least:
        return _quotient(extent, size)
    return -(-least // known) * _images(extent, least)


def block_start(index: Any, size: Any, extent: Any) -> Any:
    """Return the first element of a block."""
    known, least = static(size), constant_factor(extent)
    if known is None or known > least:
        return tirx.min(index * size, extent - size)
    if least % known == 0:
        return index * size
    # Blocks do not reach from one multiple of the constant factor, such as an image, to the next.
    count = int64(-(-least // known))
    start = tirx.min(tirx.floormod(index, count) * size, int64(least - known))
    return tirx.floordiv(index, count) * int64(least) + start


def _dynamic_count(extent: Any, multiple: int) -> Any:
    return int64(multiple) * _quotient(extent, int64(multiple * BLOCK))


def _quotient(number: Any, divisor: Any) -> Any:
    """Divide and round up."""
    return tirx.floordiv(number + (divisor - 1), divisor)


def _images(extent: Any, least: int) -> Any:
    return Analyzer().simplify(tirx.floordiv(extent, int64(least)))
