import pytest
import tvm
from tvm.script import tirx as T

from dcnv3_tvm.compiler.cpu_pipeline import PIPELINE
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.tvm_workarounds.host_passes import STACK_BYTES


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize(("size", "in_workspace"), [(STACK_BYTES, False), (STACK_BYTES + 4, True)])
def test_small_buffers_are_on_the_stack(scope, size, in_workspace):
    count = size // 4

    @T.prim_func(s_tir=True)
    def func(a: T.Buffer((8, count), "float32"), b: T.Buffer((8, count), "float32")):
        for i in T.parallel(T.int64(8)):
            with T.sblock("task"):
                copy = T.sblock_alloc_buffer((count,), "float32", scope=scope)
                for j in range(T.int64(count)):
                    copy[j] = a[i, T.int64(count - 1) - j]
                for j in range(T.int64(count)):
                    b[i, j] = copy[j] + copy[T.int64(count - 1) - j]

    module = tvm.IRModule({"main": func})
    code = tvm.compile(module, target=resolve_target(), tir_pipeline=PIPELINE).mod.inspect_source()
    assert ("TVMBackendAllocWorkspace" in code) == in_workspace


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(
    ("target", "instruction", "present"),
    [
        ("cpu-sapphirerapids", "vcvtneps2bf16", True),
        ("cpu-skylake-avx512", "vcvtneps2bf16", False),
        ("linux-aarch64:neoverse-v1", "bfcvtn", True),
        ("linux-aarch64:neoverse-n1", "bfcvtn", False),
    ],
)
def test_vectors_are_rounded_to_bfloat16_by_instructions(target, instruction, present, lanes):
    @T.prim_func(s_tir=True)
    def func(a: T.Buffer((lanes,), "float32"), b: T.Buffer((lanes,), "bfloat16")):
        for i in T.vectorized(T.int64(lanes)):
            with T.sblock("round"):
                lane = T.axis.spatial(lanes, i)
                b[lane] = T.cast(a[lane] * T.float32(2), "bfloat16")

    built = tvm.compile(
        tvm.IRModule({"main": func}), target=resolve_target(target), tir_pipeline=PIPELINE
    )
    code = built.mod.inspect_source("asm")
    assert (instruction in code) == present
