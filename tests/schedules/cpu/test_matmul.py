import pytest
from tvm import tirx
from tvm.target import Target

from dcnv3_tvm import schedules
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.kernels.packing import pack_matmul_weight
from dcnv3_tvm.op.expr import int64, product
from dcnv3_tvm.schedules import weight_tile_width
from dcnv3_tvm.schedules.cpu.register_tiles import (
    MAX_ROWS,
    VectorUnit,
    row_slack,
    row_tile,
    vector_unit,
)
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.arrays import random_array
from helpers.layers import run_kernel
from helpers.structure import block_names, buffer_scopes, loop_kinds

FULL = Epilogue(bias=True, activation="gelu", residual=True)


def check(rng, assert_close, lead, sizes, inner, columns, target, epilogue=FULL):
    """Compare the scheduled kernel for `lead`, at `sizes`, with float64."""
    tile = weight_tile_width(columns, target)
    x, weight = random_array(rng, *sizes, inner), random_array(rng, columns, inner) / inner**0.5
    bias, residual = random_array(rng, columns), random_array(rng, *sizes, columns)
    slack = row_slack(product([int64(size) for size in lead]))
    func = matmul(lead, inner, columns, tile=tile, row_slack=slack, epilogue=epilogue)
    given = [x, pack_matmul_weight(weight, tile)]
    given += [bias] if epilogue.bias else []
    given += [residual] if epilogue.residual else []
    result = run_kernel(func, given, residual.shape, target=target)
    reference = layers.finish(epilogue, x @ weight.T.astype("float64"), bias, residual)
    assert_close(result, reference)


@pytest.mark.parametrize("sizes", [(1,), (3,), (13,), (2, 7, 7), (17, 19), (1, 14, 28)])
def test_any_number_of_rows(rng, assert_close, host, sizes):
    check(rng, assert_close, sizes, sizes, 24, 40, host)


@pytest.mark.parametrize("columns", [1, 7, 16, 27, 32, 56, 108, 135, 189])
def test_any_number_of_columns(rng, assert_close, host, columns):
    check(rng, assert_close, (28,), (28,), 20, columns, host)


@pytest.mark.parametrize("sizes", [(1, 7, 7), (3, 7, 7), (2, 1, 1)])
def test_dynamic_batch_and_dynamic_shape(rng, assert_close, host, sizes):
    n, h, w = (tirx.Var(name, "int64") for name in "nhw")
    check(rng, assert_close, (n, *sizes[1:]), sizes, 16, 70, host)
    check(rng, assert_close, (n, h, w), sizes, 16, 70, host)


def test_weights_larger_than_the_cache(rng, assert_close, host):
    check(rng, assert_close, (49,), (49,), 1024, 256, host)


@pytest.mark.parametrize("sizes", [(2, 5, 7), (7, 7), (13,)])
def test_other_instruction_sets(rng, assert_close, target, sizes):
    check(rng, assert_close, sizes, sizes, 19, 75, target)
    found = schedules.schedule(matmul(sizes, 19, 75, tile=weight_tile_width(75, target)), target)
    assert found.rule == "matmul"


def test_without_epilogue(rng, assert_close, host):
    check(rng, assert_close, (14,), (14,), 8, 32, host, Epilogue())


def test_sums_stay_in_registers(host):
    func = matmul((3136,), 64, 256, tile=weight_tile_width(256, host))
    found = schedules.schedule(func, host)
    assert found.rule == "matmul"
    assert {"PARALLEL", "VECTORIZED"} <= loop_kinds(found.function)
    assert "local" in buffer_scopes(found.function)
    blocks = block_names(found.function)
    assert blocks.index("sums_init") < blocks.index("sums_update")


def test_row_tile_fills_registers_and_divides_rows():
    wide = VectorUnit(bits=512, registers=32)
    for rows in (96 * 96, 56 * 56, 28 * 28, 24 * 24, 14 * 14, 12 * 12, 49):
        tile = row_tile(rows, 32, wide, "float32")
        assert rows % tile == 0
        assert tile * 2 + 2 < 32
    n = tirx.Var("n", "int64")
    assert row_tile(product([n, 56, 56]), 32, wide, "float32") == 14
    assert row_tile(3, 32, wide, "float32") == 3
    assert row_tile(n, 32, wide, "float32") == 7


def test_row_tile_fits_a_cache_set():
    wide = VectorUnit(bits=512, registers=32)
    assert row_tile(196, 32, wide, "float32", row_bytes=1024 * 4) == 7
    assert row_tile(196, 32, wide, "float32", row_bytes=3072 * 4) == 7
    assert row_tile(196, 32, wide, "float32", row_bytes=1024 * 2) == 14
    assert row_tile(196, 32, wide, "float32", row_bytes=1280 * 4) == 14
    assert row_tile(49, 32, wide, "float32", row_bytes=2048 * 4) == 7


@pytest.mark.parametrize(
    "unit", [VectorUnit(512, 32), VectorUnit(256, 16), VectorUnit(128, 32, by_lane=True)]
)
def test_row_tiles_are_whole_or_have_slack(unit):
    for columns in (1, unit.lanes("float32"), 2 * unit.lanes("float32")):
        for rows in range(1, 2000):
            tile = row_tile(rows, columns, unit, "float32")
            assert tile <= MAX_ROWS
            assert rows % tile == 0 or row_slack(rows)


def test_vector_units_of_targets():
    def unit(**options):
        return vector_unit(Target({"kind": "llvm", **options}))

    assert unit(mcpu="znver4") == VectorUnit(512, 32)
    assert unit(mcpu="haswell") == VectorUnit(256, 16)
    assert unit(mcpu="nehalem") == VectorUnit(128, 16)
    assert unit(mtriple="aarch64-linux-gnu", mcpu="cortex-a76") == VectorUnit(128, 32, by_lane=True)


def test_depth_is_unrolled_if_sums_spill_or_tiles_are_small():
    func = matmul((49,), 64, 64, tile=16)
    narrow = schedules.schedule(func, resolve_target("cpu-haswell")).space
    assert (narrow["rows"][0], narrow["unroll"][0]) == (7, 4)
    func = matmul((49,), 64, 64, tile=32)
    wide = schedules.schedule(func, resolve_target("cpu-znver4")).space
    assert (wide["rows"][0], wide["unroll"][0]) == (7, 2)


def test_row_slack_only_where_no_row_tile_divides():
    n = tirx.Var("n", "int64")
    assert [row_slack(rows) for rows in (3136, n * 49, 3)] == [0, 0, 0]
    assert [row_slack(rows) for rows in (17 * 19, n, n * 17)] == [MAX_ROWS - 1] * 3
