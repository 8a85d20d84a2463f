import pytest
from tvm.target import Target

from dcnv3_tvm.errors import TargetError
from dcnv3_tvm.targets import (
    host_cpu,
    num_cores,
    resolve_target,
    target_slug,
    vector_bits,
    vector_lanes,
)


@pytest.mark.parametrize("name", ["auto", "cpu", "llvm"])
def test_this_machine(name):
    target = resolve_target(name)
    assert target.attrs["mcpu"] == host_cpu()
    assert target_slug(target) == f"cpu-{host_cpu()}"
    assert num_cores(target) >= 1


@pytest.mark.parametrize(
    "name",
    [
        "cpu-znver4",
        "llvm -mcpu=znver4",
        {"kind": "llvm", "mcpu": "znver4"},
        Target({"kind": "llvm", "mcpu": "znver4"}),
    ],
    ids=str,
)
def test_another_machine(name):
    target = resolve_target(name)
    assert target_slug(target) == "cpu-znver4"
    assert vector_bits(target) == 512
    assert vector_lanes(target, "float32") == 16
    assert vector_lanes(target, "float16") == 32


def test_options():
    target = resolve_target(
        "llvm -mtriple=x86_64-linux-gnu -mcpu=haswell -mattr=-avx2,-fma -num-cores=3"
    )
    assert list(target.attrs["mattr"]) == ["-avx2", "-fma"]
    assert num_cores(target) == 3
    assert vector_bits(target) == 256
    assert vector_bits(resolve_target("cpu-x86-64")) == 128
    assert target_slug(Target("llvm")) == "cpu-generic"


def test_gpu_slug():
    assert target_slug(Target({"kind": "cuda", "arch": "sm_90"})) == "cuda-sm90"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "target is empty"),
        ("tpu", "target is unknown; got 'tpu'; allowed: \"auto\""),
        ("auto -mcpu=znver4", "target is unknown"),
        ("cpu-zen9", "LLVM does not know the processor; got mcpu='zen9'; allowed: .*znver4"),
        ("llvm -mcpu", "a target option has no value"),
        ("llvm mcpu=znver4", "a target option has no value"),
        ("llvm -unroll=3", "a target option is unknown"),
        ("llvm -num-cores=two", "a target option is unknown"),
        ({"kind": "vulkan"}, "target is not a CPU"),
        (Target({"kind": "cuda", "arch": "sm_90"}), "target is not a CPU"),
        (7, "target is not understood"),
    ],
    ids=str,
)
def test_others_are_refused_with_the_list(name, message):
    with pytest.raises(TargetError, match=message):
        resolve_target(name)
