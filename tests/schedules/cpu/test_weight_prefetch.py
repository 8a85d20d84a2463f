"""Which lines of packed weights CPU kernels prefetch, and what their inner loops become."""

import itertools
import math

import pytest
import tvm
from tvm import ir, s_tir, tirx
from tvm.sym import Analyzer

from dcnv3_tvm import schedules
from dcnv3_tvm.compiler import cpu_pipeline
from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.targets import resolve_target
from helpers.structure import nodes

AVX512 = "cpu-emeraldrapids"
LINE = 16
"""Elements of a cache line."""


def scheduled(func, decisions=None, target=AVX512):
    return schedules.schedule(func, resolve_target(target), decisions)


def prefetches(root):
    return [call for call in nodes(root, ir.Call) if call.op.name == "tirx.prefetch"]


def prefetched_lines(func, sizes):
    """Return the lines prefetched while tasks multiply by each weight tile, for dynamic `sizes`."""
    weight = func.params[1]
    loops = [loop for loop in nodes(func.body, tirx.For) if prefetches(loop)]
    (update,) = (
        node for node in nodes(loops[-1], s_tir.SBlockRealize) if "update" in node.block.name_hint
    )
    (read,) = (region for region in update.block.reads if region.source.same_as(weight))
    inner = {loop.loop_var: 0 for loop in nodes(loops[-1].body, tirx.For)}
    block = {
        axis.var: to for axis, to in zip(update.block.iter_vars, update.iter_values, strict=True)
    }
    lines = {}
    for point in itertools.product(*(range(value(loop.extent, sizes)) for loop in loops)):
        at = sizes | dict(zip((loop.loop_var for loop in loops), point, strict=True))
        prefetched = lines.setdefault(value(read.region[0].min, at | inner | block), set())
        for call in prefetches(func.body):
            element = 0
            for index, size in zip(call.args[0].args[0].indices, weight.shape, strict=True):
                element = element * int(size) + value(index, at)
            prefetched.add(element // LINE)
    return lines


def value(expression, known):
    """Return the integer value of an expression of known variables."""
    analyzer = Analyzer()
    for variable, number in known.items():
        analyzer.bind(variable, number if isinstance(number, ir.Expr) else int64(number))
    return int(analyzer.simplify(expression))


def check_next_tiles(func, sizes=None):
    """Check that the tasks of a tile prefetch all of the next, and nothing outside the weights."""
    tiles, *rest = map(int, func.params[1].shape)
    count = math.prod(rest) // LINE
    lines = prefetched_lines(func, sizes or {})
    assert set(lines) == set(range(tiles))
    for tile in range(tiles - 1):
        assert lines[tile] >= set(range((tile + 1) * count, (tile + 2) * count))
    assert set().union(*lines.values()) <= set(range(tiles * count))


@pytest.mark.parametrize("unroll", [1, 4])
@pytest.mark.parametrize("block", [1, 2, 0])
def test_tasks_prefetch_the_next_tile(block, unroll):
    decisions = {"rows": 7, "block": block, "unroll": unroll}
    check_next_tiles(scheduled(matmul((42,), 12, 96, tile=32), decisions).function)


def test_of_one_image_of_a_dynamic_batch():
    batch = tirx.Var("n", "int64")
    func = scheduled(matmul((batch, 14, 14), 8, 96, tile=32)).function
    check_next_tiles(func, {batch: 2})


def test_of_any_image_size_if_tasks_iterate_over_columns_first():
    height = tirx.Var("h", "int64")
    func = matmul((1, height, height), 4, 96, tile=32)
    check_next_tiles(scheduled(func, {"block": 0}).function, {height: 6})


def test_narrow_vectors_and_pairs():
    check_next_tiles(scheduled(matmul((42,), 12, 48, tile=16), target="cpu-haswell").function)
    pairs = matmul((42,), 12, 96, tile=32, dtype="bfloat16")
    assert len(prefetches(scheduled(pairs, target="cpu-znver4").function)) == 2


def test_convolutions_that_iterate_over_columns_first():
    func = convolution(1, 8, 8, 4, 64, kernel_size=(3, 3), stride=(2, 2), pad=(1, 1), tile=32)
    check_next_tiles(scheduled(func, {"plan": "image, columns first"}).function)
    assert not prefetches(scheduled(func, {"plan": "row"}).function)


def test_only_where_rows_are_few_and_known():
    height = tirx.Var("h", "int64")
    for lead in ((56, 56), (1, height, height)):
        assert not prefetches(scheduled(matmul(lead, 64, 256, tile=32)).function)
    few = matmul((196,), 256, 64, tile=8)
    assert not prefetches(scheduled(few, target="linux-aarch64:neoverse-n1").function)


def test_sums_stay_in_registers():
    func = scheduled(matmul((196,), 256, 1024, tile=32)).function
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    built = tvm.compile(module, target=resolve_target(AVX512), tir_pipeline=cpu_pipeline.PIPELINE)
    code = [line.strip() for line in built.mod.inspect_source("asm").splitlines()]
    (at,) = (number for number, line in enumerate(code) if line.startswith("prefetcht1"))
    end = next(number for number in range(at, len(code)) if code[number].startswith("j"))
    loop = code[code.index(f"{code[end].split()[-1]}:") : end]
    assert len([line for line in loop if line.startswith("vfmadd")]) == 2 * 14
    assert not [line for line in loop if line.startswith("vmov") and line.endswith(")")]


def test_blocks_have_half_of_few_rows():
    def block(*sizes):
        *lead, inner, columns = sizes
        return scheduled(matmul(tuple(lead), inner, columns, tile=32)).space["block"][0]

    assert block(14, 14, 256, 1024) == block(14, 14, 256, 256) == 7
    assert block(14, 14, 1024, 256) == 14
    # Rows of x beyond the L2 cache: fewer.
    assert block(28, 28, 896, 224) == 14
    # Tiles that do not divide well, or too few of them: weights are read once.
    assert block(7, 7, 512, 2048) == block(1, 768, 1000) == 0
    # Of many rows, small weights are read again from the cache.
    assert block(56, 56, 64, 256) == 1
    assert block(96, 96, 192, 768) == 64
