"""Machine code for AArch64: vectors, lanes and registers. `tests/emulated_arm64` runs it."""

import re

import pytest
import tvm

from dcnv3_tvm.compiler import cpu_pipeline
from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.depthwise import depthwise
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.op.tensorir import dcnv3_packed
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from helpers.aarch64_code import inner_loops
from helpers.variant_kernels import variant_kernels

N1 = "linux-aarch64:neoverse-n1"
V1 = "linux-aarch64:neoverse-v1"


def code_of(func, target):
    """Return the assembly of a scheduled function."""
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    built = tvm.compile(module, target=target, tir_pipeline=cpu_pipeline.PIPELINE)
    assert "llvm.x86" not in built.mod.inspect_source()
    return built.mod.inspect_source("asm")


def scheduled_code(func, target, rule):
    target = resolve_target(target)
    module, rules = schedule_module(tvm.IRModule({"main": func}), target)
    assert rules["main"].rule == rule
    return code_of(module["main"], target)


@pytest.mark.parametrize(("target", "dtype"), [(N1, "float32"), (V1, "bfloat16")])
@pytest.mark.parametrize(("rows", "tile"), [(56, 8), (49, 7)])
def test_matmul_multiplies_by_lane(target, dtype, rows, tile):
    """A load of x serves four steps of a row, and one of weights all rows of a tile."""
    code = scheduled_code(matmul((rows,), 64, 32, tile=8, dtype=dtype), target, "matmul")
    (loop,) = inner_loops(code)
    sums = 2 * tile
    assert loop.vector == loop.by_lane == 4 * sums
    assert (loop.loads, loop.spills) == (8 + tile, 0)
    # Next to multiply-adds and loads: the addresses and the branch.
    assert loop.instructions <= loop.vector + loop.loads + 6
    assert len(re.findall("bfdot", code)) == (loop.vector if dtype == "bfloat16" else 0)


def test_convolution_multiplies_by_lane():
    func = convolution(1, 14, 14, 32, 64, kernel_size=(3, 3), stride=(1, 1), pad=(1, 1), tile=8)
    for loop in inner_loops(scheduled_code(func, N1, "convolution")):
        assert loop.vector == loop.by_lane == 4 * 2 * 7
        assert (loop.loads, loop.spills) == (8 + 7, 0)


@pytest.mark.parametrize(
    ("inputs", "dtype", "target"), [(19, "float32", N1), (64, "bfloat16", V1), (6, "bfloat16", V1)]
)
def test_any_number_of_input_features(inputs, dtype, target):
    """Those that fill no vectors are multiplied one by one."""
    func = matmul((12,), inputs, 16, tile=8, dtype=dtype)
    loops = inner_loops(scheduled_code(func, target, "matmul"))
    assert all(loop.vector and not loop.spills for loop in loops)


def test_dcnv3_multiplies_by_lane():
    """Sums of two groups, and the weights of their points, stay in registers."""
    spec = DCNv3Spec.of((1, 28, 28, 64), group=4, softmax=True)
    loops = inner_loops(scheduled_code(dcnv3_packed(spec, vector_loads=False), N1, "dcnv3"))
    points = max(loops, key=lambda loop: loop.vector)
    # 2 groups of 9 points of 4 pixels, each of 2 vectors.
    assert points.vector == points.by_lane == 2 * 9 * 4 * 2
    assert points.spills == 0
    # A load of each pixel, and one of each four weights and then some.
    assert points.loads <= 1.5 * points.vector
    assert not any(loop.scalar for loop in loops)


def test_depthwise_multiplies_vectors():
    """Sums of eight pixels stay in registers over the window; normalization is in vectors."""
    func = depthwise(
        *(1, 8, 8, 64), kernel_size=(3, 3), pad=(1, 1), bias=True, norm_eps=1e-6, activation="gelu"
    )
    loops = inner_loops(scheduled_code(func, N1, "depthwise"))
    # The window, the variance, and normalization with activation.
    assert len(loops) == 3
    assert max(loop.vector for loop in loops) == 8 * 9
    assert not any(loop.scalar or loop.spills for loop in loops)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), [(N1, "float32"), (V1, "bfloat16")])
def test_kernels_of_a_variant(target, dtype):
    """Every kernel has a rule of its own and multiplies vectors; sums stay in registers."""
    target = resolve_target(target)
    for kernel in variant_kernels("internimage_t", target, dtype):
        rule = "dcnv3" if kernel.kind == "dcnv3_packed" else kernel.kind
        assert kernel.rule == rule, kernel.name
        loops = inner_loops(code_of(kernel.function, target))
        assert bool(loops) == (kernel.rule != "fallback"), kernel.name
        for loop in loops:
            assert loop.vector > 0 == loop.scalar, (kernel.name, loop)
            # LLVM unrolls short loops over what is no tile of sums, and spills some values there.
            inputs = kernel.inputs[0].shape[-1]
            tiles = kernel.rule in ("matmul", "convolution") and inputs % 4 == 0
            assert loop.spills <= (0 if tiles else loop.instructions / 12), (kernel.name, loop)
