"""Matmuls in matrix tiles: with AMX where this processor has it, and without."""

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import tirx

from dcnv3_tvm import machine
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.packing import pack_tile_weight
from dcnv3_tvm.kernels.tile_matmul import block_rows, tile_matmul
from dcnv3_tvm.op.expr import int64, product
from dcnv3_tvm.schedules import schedule, schedule_module
from dcnv3_tvm.targets import has_amx, resolve_target
from helpers import layers
from helpers.guarded import GuardedOutput, surrounded
from helpers.layers import run_kernel

FULL = Epilogue(bias=True, activation="gelu", residual=True)
AMX = "cpu-sapphirerapids"
PORTABLE = "cpu-x86-64-v3"


@pytest.fixture(params=["auto", PORTABLE])
def target(request):
    machine.enable_amx()
    return resolve_target(request.param)


def narrow(rng, *shape):
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


def check(rng, assert_close, target, lead, sizes, inner, columns, epilogue=FULL, dtype="float32"):
    """Compare a kernel for `lead` at `sizes`; NaN around x and out shows accesses outside."""
    x, weight = narrow(rng, *sizes, inner), narrow(rng, columns, inner)
    bias = rng.standard_normal(columns).astype("float32")
    residual = rng.standard_normal((*sizes, columns)).astype("float32")
    func = tile_matmul(lead, inner, columns, epilogue=epilogue, out_dtype=dtype)
    module, kernels = schedule_module(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target
    )
    assert kernels["main"].rule == "tile_matmul"
    given = [x, pack_tile_weight(weight)]
    given += [bias] if epilogue.bias else []
    given += [residual] if epilogue.residual else []
    out = GuardedOutput(residual.shape, dtype)
    tvm.compile(module, target=target)["main"](*map(surrounded, given), out.argument)
    if 0 in sizes:
        return  # No rows are no result, but must not be divided by.
    exact = x.astype("float64") @ weight.T.astype("float64")
    reference = layers.finish(epilogue, exact, bias, residual)
    if dtype == "bfloat16":
        # The store rounds a float32 value, which has rounding errors of its own.
        limit = 2.0**-8 * np.abs(reference) + 1e-5 * np.abs(reference).max()
        assert (np.abs(out.checked().astype("float64") - reference) <= limit).all()
    else:
        assert_close(out.checked(), reference)


@pytest.mark.parametrize("sizes", [(1,), (2,), (17,), (2, 7, 7), (11, 19)])
def test_any_number_of_rows(rng, assert_close, target, sizes):
    check(rng, assert_close, target, sizes, sizes, 64, 96)


@pytest.mark.parametrize(("inner", "columns"), [(32, 32), (33, 47), (80, 112), (131, 64)])
def test_any_number_of_columns_and_inputs(rng, assert_close, target, inner, columns):
    check(rng, assert_close, target, (9,), (9,), inner, columns)


def test_dynamic_batch_and_dynamic_shape(rng, assert_close, target):
    n, h, w = (tirx.Var(name, "int64") for name in "nhw")
    check(rng, assert_close, target, (n, 7, 7), (3, 7, 7), 32, 64)
    check(rng, assert_close, target, (n, 10, 10), (3, 10, 10), 32, 64)
    for sizes in ((1, 1, 1), (3, 7, 7), (0, 7, 7)):
        check(rng, assert_close, target, (n, h, w), sizes, 32, 64)
    check(rng, assert_close, target, (n, h, w), (2, 5, 9), 480, 480)


@pytest.mark.parametrize("epilogue", [Epilogue(), FULL])
def test_bfloat16_output(rng, assert_close, target, epilogue):
    check(rng, assert_close, target, (21,), (21,), 64, 48, epilogue, "bfloat16")


def test_unscheduled_definition_runs_anywhere(rng, assert_close):
    x, weight = narrow(rng, 5, 40), narrow(rng, 32, 40)
    func = tile_matmul((5,), 40, 32)
    given = [x, pack_tile_weight(weight)]
    out = run_kernel(func, given, (5, 32), scheduled=False, dtype="float32")
    assert_close(out, x.astype("float64") @ weight.T.astype("float64"))


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_decisions(rng, assert_close, order):
    x, weight = narrow(rng, 98, 64), narrow(rng, 64, 64)
    machine.enable_amx()
    target = resolve_target()
    func = tile_matmul((98,), 64, 64)
    found = schedule(func, target, {"order": order, "together": 2})
    out = GuardedOutput((98, 64), "float32")
    compiled = tvm.compile(found.function.with_attr("global_symbol", "main"), target=target)
    compiled["main"](*map(surrounded, (x, pack_tile_weight(weight))), out.argument)
    assert_close(out.checked(), x.astype("float64") @ weight.T.astype("float64"))


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "together"), [(576, 640, 640, 1), (576, 2560, 640, 2)]
)
def test_blocks_share_operands_that_exceed_the_cache(rows, inner, columns, together):
    space = schedule(tile_matmul((rows,), inner, columns), resolve_target(AMX)).space
    assert space["together"][0] == together


def test_tasks_of_dynamic_rows_have_part_of_many_weights():
    n = tirx.Var("n", "int64")
    for inner, order, together in ((256, "rows", 4), (512, "columns", 2)):
        space = schedule(tile_matmul((n, 7), inner, 512), resolve_target(AMX)).space
        assert (space["order"][0], space["together"][0]) == (order, together)


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "order", "together"),
    [
        (196, 256, 1024, "rows", 4),
        (144, 256, 432, "rows", 3),
        (196, 448, 1792, "columns", 1),
        (49, 512, 512, "columns", 2),
    ],
)
def test_tasks_of_few_rows(rows, inner, columns, order, together):
    """A task has half of the rows, an even number of blocks, unless it would read many weights."""
    space = schedule(tile_matmul((rows,), inner, columns), resolve_target(AMX)).space
    assert (space["order"][0], space["together"][0]) == (order, together)


def test_sums_stay_in_tiles():
    func = tile_matmul((3136,), 4096, 32).with_attr("global_symbol", "main")
    target = resolve_target(AMX)
    assert has_amx(target)
    assert not has_amx(resolve_target(PORTABLE))
    module, _ = schedule_module(tvm.IRModule({"main": func}), target)
    lines = tvm.compile(module, target=target).mod.inspect_source("asm").splitlines()
    names = [line.split()[0] for line in lines if line.startswith("\t")]
    first, last = names.index("tdpbf16ps"), len(names) - names[::-1].index("tdpbf16ps")
    loop = names[first:last]
    assert "tilestored" not in loop
    assert "tileloadd" in loop
    # Tasks configure the tiles, blocks do not.
    assert names.count("ldtilecfg") == names.count("tilerelease") == 1


def test_rows_of_a_block():
    n = tirx.Var("n", "int64")
    assert [int(block_rows(rows)) for rows in (1, 32, 49, 196, 784)] == [1, 32, 25, 28, 28]
    assert int(block_rows(product([n, int64(49)]))) == 25
    assert isinstance(block_rows(n), tirx.Min)
    assert [int(block_rows(rows, multiple=2)) for rows in (1, 49, 100, 196)] == [1, 25, 25, 25]


def test_packing(rng):
    weight = narrow(rng, 40, 72)
    packed = pack_tile_weight(weight)
    assert packed.shape == (2, 3, 2, 16, 16, 2)
    assert packed[0, 1, 1, 3, 5, 1] == weight[21, 32 + 7]
    # The last block ends at the last column, the last step at the last input.
    assert packed[1, 2, 1, 15, 15, 1] == weight[39, 71]
    assert packed[1, 0, 0, 0, 0, 0] == weight[8, 0]
    assert not packed[:, 2, :, :12].any()


def test_rejects_matmuls_smaller_than_a_block():
    with pytest.raises(InvalidArgumentError, match=r"31 input and 32 output.*at least 32"):
        tile_matmul((4,), 31, 32)
