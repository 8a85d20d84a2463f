import pytest
from tvm.target import Target

from dcnv3_tvm import gpu, machine, targets
from dcnv3_tvm.errors import TargetError
from dcnv3_tvm.systems import SYSTEMS
from dcnv3_tvm.targets import (
    artifact_slug,
    gpu_architecture,
    has_amx,
    has_bfloat16_dot,
    has_fast_bfloat16,
    host_cpu,
    is_gpu,
    num_cores,
    resolve_target,
    target_features,
    target_slug,
    target_system,
    vector_bits,
    vector_lanes,
)


@pytest.mark.parametrize("name", ["auto", "cpu", "llvm"])
def test_this_machine(name):
    target = resolve_target(name)
    assert target.attrs["mcpu"] == host_cpu()
    assert target_slug(target) == f"cpu-{host_cpu()}"
    assert num_cores(target) >= 1


def test_features_that_a_virtual_machine_hides(report_features):
    present = machine.cpu_features()
    hidden = min(present & target_features(resolve_target("auto")))
    report_features(present - {hidden})
    target = resolve_target("auto")
    assert f"-{hidden}" in target.attrs["mattr"]
    assert machine.missing_features(target_features(target)) == []
    assert target_slug(target) == f"cpu-{host_cpu()}"


@pytest.mark.parametrize("offered", [True, False])
def test_amx_that_the_system_denies(monkeypatch, offered, report_features):
    named = target_features(resolve_target("cpu-sapphirerapids"))
    monkeypatch.setattr(targets, "host_cpu", lambda: "sapphirerapids")
    report_features(named)
    monkeypatch.setattr(machine, "offers_amx", lambda: offered)
    assert has_amx(resolve_target("auto")) == offered
    assert has_fast_bfloat16(resolve_target("auto")) == offered
    assert has_amx(resolve_target("cpu-sapphirerapids"))  # For another machine.


@pytest.mark.parametrize(
    ("name", "amx", "dot"),
    [
        ("cpu-emeraldrapids", True, False),
        ("llvm -mcpu=sapphirerapids -mattr=-amx-tile", False, False),
        ("cpu-cooperlake", False, True),
        ("cpu-znver5", False, True),
        ("cpu-skylake-avx512", False, False),
        ("linux-aarch64:neoverse-v1", False, True),
        ("macos-arm64:apple-m2", False, True),
        ("linux-aarch64:neoverse-n1", False, False),
    ],
)
def test_bfloat16_instructions(name, amx, dot):
    target = resolve_target(name)
    assert (has_amx(target), has_bfloat16_dot(target)) == (amx, dot)
    assert has_fast_bfloat16(target) == (amx or dot)


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
def test_named_processor(name):
    target = resolve_target(name)
    assert target_slug(target) == "cpu-znver4"
    assert vector_bits(target) == 512
    assert vector_lanes(target, "float32") == 16
    assert vector_lanes(target, "float16") == 32


def test_llvm_options():
    target = resolve_target(
        "llvm -mtriple=x86_64-linux-gnu -mcpu=haswell -mattr=-avx2,-fma -num-cores=3"
    )
    assert list(target.attrs["mattr"]) == ["-avx2", "-fma"]
    assert num_cores(target) == 3
    assert vector_bits(target) == 256
    assert vector_bits(resolve_target("cpu-x86-64")) == 128
    assert target_slug(Target("llvm")) == "cpu-generic"


@pytest.mark.parametrize(
    ("name", "slug", "artifact"),
    [
        ("linux-aarch64", "cpu-generic", "linux-aarch64"),
        ("linux-aarch64:neoverse-n1", "cpu-neoverse-n1", "linux-aarch64-neoverse-n1"),
        ("macos-arm64", "cpu-apple-m1", "macos-arm64-apple-m1"),
        ("windows-x86_64", "cpu-x86-64-v3", "windows-x86_64-v3"),
        ("windows-x86_64:znver4", "cpu-znver4", "windows-x86_64-znver4"),
    ],
)
def test_systems(name, slug, artifact):
    target = resolve_target(name)
    assert (target_slug(target), artifact_slug(target)) == (slug, artifact)
    assert target_system(target) == SYSTEMS[name.partition(":")[0]]
    again = targets.target_from_text(targets.target_text(name))
    assert str(again) == str(target)


def test_name_of_this_system(monkeypatch):
    monkeypatch.setattr(targets, "this_system", lambda: SYSTEMS["macos-arm64"])
    target = resolve_target("macos-arm64:apple-m2")
    assert artifact_slug(target) == target_slug(target) == "cpu-apple-m2"


@pytest.mark.parametrize(
    "name",
    [
        "cuda-sm90",
        "cuda-sm_90",
        "cuda -arch=sm_90",
        {"kind": "cuda", "arch": "sm_90"},
        Target({"kind": "cuda", "arch": "sm_90"}),
    ],
    ids=str,
)
def test_gpu_architecture(name):
    target = resolve_target(name)
    assert is_gpu(target)
    assert target_slug(target) == "cuda-sm90"
    assert target.host.kind.name == "llvm"
    assert gpu_architecture(target).block_shared_bytes == 227 * 1024


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "devices", lambda: ())
    with pytest.raises(TargetError, match=r'no NVIDIA GPU.*target="cuda-sm90"'):
        resolve_target("cuda")


def test_cuda_is_the_first_gpu(monkeypatch):
    here = gpu.GpuInfo(0, "NVIDIA A10", "sm_86", 24 * 2**30)
    monkeypatch.setattr(gpu, "devices", lambda: (here,))
    assert target_slug(resolve_target("cuda")) == "cuda-sm86"
    with pytest.raises(
        TargetError, match=r"GPU does not exist; got cuda:1; allowed: cuda:0 \(NVIDIA A10\)"
    ):
        gpu.device(1)


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
        ({"kind": "vulkan"}, "target is neither a CPU nor an NVIDIA GPU"),
        ("cuda-sm75", "GPU architecture is not supported; got sm_75; allowed: sm_80, "),
        ("cuda-sm90 -x", "target is unknown"),
        ("cuda -mcpu=sm_90", "target is unknown"),
        (7, "target is not valid"),
        ("linux-arm64", "allowed: .*linux-x86_64, linux-aarch64, macos-arm64, windows-x86_64"),
        ("linux-aarch64:", "target is unknown"),
        ("linux-aarch64 -mcpu=neoverse-n1", "target is unknown"),
        ("macos-arm64:v3", "LLVM does not know the processor; got mcpu='v3'; allowed: .*apple-m1"),
        ("linux-x86_64:apple-m1", "LLVM does not know the processor"),
        (
            Target(
                {"kind": "cuda", "arch": "sm_90"},
                host={"kind": "llvm", "mtriple": "aarch64-linux-gnu"},
            ),
            "GPU code for another system is not supported; got a host with mtriple aarch64",
        ),
    ],
    ids=str,
)
def test_invalid_targets_are_rejected(name, message):
    with pytest.raises(TargetError, match=message):
        resolve_target(name)
