"""GPU support that needs neither a GPU nor its emulation: compatibility, errors, PyTorch."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch

from dcnv3_tvm import gpu, runtime
from dcnv3_tvm.errors import (
    ArtifactError,
    DeviceError,
    InvalidArgumentError,
    MissingDependencyError,
    TargetError,
)
from dcnv3_tvm.runtime import TargetInfo, cuda, cuda_toolkit, library
from dcnv3_tvm.runtime.arguments import Arguments
from dcnv3_tvm.runtime.loading import check_target
from dcnv3_tvm.signature import TensorInfo

H200 = gpu.GpuInfo(0, "NVIDIA H200", "sm_90", 150_000_000_000)
A10 = gpu.GpuInfo(1, "NVIDIA A10", "sm_86", 24_000_000_000)
FOR_HOPPER = TargetInfo("cuda", slug="cuda-sm90", arch="sm_90")
IMAGE = TensorInfo("image", (1, 3, 8, 8), "float32", "NCHW")
OUT_OF_MEMORY = RuntimeError("CUDA Runtime Error: cudaErrorMemoryAllocation (2): out of memory")


@pytest.mark.parametrize(
    ("compiled", "present", "runs"),
    [
        ("sm_90", "sm_90", True),
        ("sm_86", "sm_89", True),
        ("sm_89", "sm_86", False),
        ("sm_80", "sm_86", False),  # Less shared memory.
        ("sm_86", "sm_87", False),  # Embedded GPU.
        ("sm_80", "sm_90", False),
        ("sm_90", "sm_100", False),
        ("sm_90", "sm_91", False),  # Unknown architecture.
    ],
)
def test_runs_on(compiled, present, runs):
    assert gpu.runs_on(compiled, present) is runs


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(gpu, "devices", lambda: (H200, A10))


@pytest.mark.parametrize(
    ("device", "index"), [(None, 0), ("cuda", 0), ("cuda:0", 0)], ids=["default", "kind", "number"]
)
@pytest.mark.usefixtures("two_gpus")
def test_device(device, index):
    assert check_target(FOR_HOPPER, device) == index
    assert check_target(TargetInfo("cuda", arch="sm_86"), "cuda:1") == 1
    assert check_target(TargetInfo("llvm"), None) is None


@pytest.mark.parametrize(
    ("target", "device", "message"),
    [
        (FOR_HOPPER, "cuda:1", r"sm_90, but cuda:1 \(NVIDIA A10\) is sm_86.*--target cuda-sm86"),
        (
            FOR_HOPPER,
            "cuda:2",
            r"not exist; got cuda:2; allowed: cuda:0 \(NVIDIA H200\), cuda:1",
        ),
        (FOR_HOPPER, "cpu", "runs on cuda, not on cpu.*--target auto"),
        (TargetInfo("llvm"), "cuda", "runs on cpu, not on cuda.*--target cuda"),
        (FOR_HOPPER, "cuda:x", "device name is invalid; got 'cuda:x'"),
        (FOR_HOPPER, "gpu", "device name is invalid; got 'gpu'"),
        (TargetInfo("llvm"), "cpu:0", "device name is invalid"),
        (TargetInfo("rocm"), None, "neither for a CPU nor for an NVIDIA GPU; got target rocm"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_device_does_not_fit(target, device, message):
    with pytest.raises(TargetError, match=message):
        check_target(target, device)


@pytest.mark.skipif(bool(gpu.devices()), reason="needs a machine without a GPU")
def test_gpu_artifact_on_a_machine_without_a_gpu(gpu_artifact):
    files = {path.name for path in gpu_artifact.iterdir()}
    assert {"libtvm_runtime.so", "libtvm_runtime_cuda.so", "model.so"} <= files
    metadata = runtime.read_metadata(gpu_artifact)
    assert "libtvm_runtime_cuda.so" in metadata.digests
    assert (metadata.target.kind, metadata.target.arch) == ("cuda", "sm_90")
    assert "architecture sm_90" in (gpu_artifact / "README.md").read_text()
    with pytest.raises(TargetError, match="for NVIDIA GPUs, and this machine has none"):
        runtime.load(gpu_artifact)


@pytest.mark.usefixtures("two_gpus")
def test_modified_library(gpu_artifact):
    path = gpu_artifact / "libtvm_runtime_cuda.so"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"libtvm_runtime_cuda\.so was modified"):
        runtime.load(gpu_artifact)


def test_metadata_without_arch(toy):
    data = json.loads(toy.metadata.dumps())
    del data["target"]["arch"]
    read = runtime.ArtifactMetadata.loads(json.dumps(data), verify_digest=False)
    assert read.target == toy.metadata.target


def test_cudart_not_installed(monkeypatch, tmp_path):
    def fail(path, *_):
        raise OSError(path)

    monkeypatch.setattr(cuda_toolkit.ctypes, "CDLL", fail)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    cuda_toolkit._cudart.cache_clear()
    try:
        assert cuda_toolkit.find_cudart() is None
        with pytest.raises(MissingDependencyError, match=r"pip install 'nvidia-cuda-runtime>=13"):
            cuda_toolkit.load_cudart()
    finally:
        cuda_toolkit._cudart.cache_clear()


def test_find_parts_of_the_toolkit(monkeypatch, tmp_path):
    package, home = tmp_path / "nvidia" / "cu13", tmp_path / "toolkit"
    for file in ("lib/libnvrtc.so.13", "include/cuda_fp16.h", "include/cccl/cuda/std/cstdint"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).touch()
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cuda_toolkit.find_nvcc() == home / "bin" / "nvcc"
    assert cuda_toolkit.find_nvrtc() == package / "lib" / "libnvrtc.so.13"
    assert cuda_toolkit.find_headers() == [package / "include", package / "include" / "cccl"]


class FakeGpu(cuda.Gpu):
    """A GPU whose memory is the CPU's, so that it accepts PyTorch's CPU tensors."""

    def __init__(self, index: int = 0) -> None:
        self.streams: list[int] = []
        self.orders: list[tuple[int, int]] = []
        super().__init__(index)
        self.name = "cpu"
        self._select = lambda *_: None

    def free_bytes(self):
        return 5_000_000


@pytest.fixture
def fake_gpu(artifact_path):
    runtime.load(artifact_path)  # Loads TVM's runtime library.
    return FakeGpu()


class FakeCudart:
    """Count how often the last error is cleared."""

    def __init__(self) -> None:
        self.cleared = 0

    def cudaGetLastError(self):  # noqa: N802 - CUDA's name
        self.cleared += 1


def test_errors_of_the_gpu(fake_gpu, monkeypatch):
    cudart = FakeCudart()
    monkeypatch.setattr(cuda_toolkit, "load_cudart", lambda: cudart)
    needed = cuda.needed_memory(2_500_000_000, 1_500_000)
    message = str(fake_gpu.translate_error(OUT_OF_MEMORY, needed=needed))
    assert "needed: 2.50 GB for weights and 1.5 MB for a call, free: 5.0 MB" in message
    assert "torch.cuda.empty_cache()" in message
    assert cudart.cleared == 1
    assert "an unknown amount for a call" in cuda.needed_memory(1, None)
    failed = fake_gpu.translate_error(
        RuntimeError("CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS\n grid")
    )
    assert isinstance(failed, DeviceError)
    assert "got CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS." in str(failed)
    assert fake_gpu.translate_error(ValueError("Mismatched shape")) is None


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_aligned_torch_tensors_are_not_copied(fake_gpu, offset):
    memory = torch.arange(192.0 + 4)
    image = memory[offset : offset + 192].view(1, 3, 8, 8)
    (taken,) = Arguments([image], [IMAGE], fake_gpu).to_kernel([])
    assert (taken.data_ptr() == image.data_ptr()) is (offset % 4 == 0)
    assert taken.data_ptr() % 16 == 0
    np.testing.assert_array_equal(np.from_dlpack(taken), image.numpy())


def test_strided_torch_tensors_are_copied(fake_gpu):
    image = torch.arange(192.0).view(1, 8, 8, 3).permute(0, 3, 1, 2).requires_grad_()
    (taken,) = Arguments([image], [IMAGE], fake_gpu).to_kernel([])
    np.testing.assert_array_equal(np.from_dlpack(taken), image.detach().numpy())


def test_sizes_in_multiples_are_two_axes(fake_gpu):
    image = torch.arange(192.0).view(1, 3, 8, 8)
    info = dataclasses.replace(IMAGE, shape=("n", 3, "4*h", "8*w"))
    (taken,) = Arguments([image], [info], fake_gpu).to_kernel([])
    np.testing.assert_array_equal(np.from_dlpack(taken), image.view(1, 3, 2, 4, 1, 8))
    assert taken.data_ptr() == image.data_ptr()


def test_inputs_of_different_kinds(fake_gpu):
    values = [torch.zeros(1, 3, 8, 8), np.zeros((1, 3, 8, 8), np.float32)]
    with pytest.raises(InvalidArgumentError, match="different kinds; got torch, numpy"):
        Arguments(values, [IMAGE, IMAGE], fake_gpu)


@pytest.fixture
def busy_torch(monkeypatch):
    """Let PyTorch report an initialized GPU and stream 7; return the devices it switches to."""
    entered = []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield
        entered.append("restored")

    stream = type("Stream", (), {"cuda_stream": 7})()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return entered


def test_torch_stream_is_used_and_torch_device_restored(fake_gpu, busy_torch):
    arguments = Arguments([torch.zeros(1, 3, 8, 8)], [IMAGE], fake_gpu)
    assert arguments.stream == 7
    ffi = library.tvm_ffi()
    with fake_gpu.on_stream(7):
        assert ffi.get_raw_stream(fake_gpu.device) == 7
        assert busy_torch == [0]
    assert ffi.get_raw_stream(fake_gpu.device) == 0
    assert busy_torch == [0, "restored"]
    assert Arguments([np.zeros((1, 3, 8, 8), np.float32)], [IMAGE], fake_gpu).stream == 0


@pytest.mark.usefixtures("busy_torch")
def test_model_call_during_graph_capture(fake_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with (
        pytest.raises(InvalidArgumentError, match="cannot be captured"),
        fake_gpu.model_call(7),
    ):
        pytest.fail("the model ran")
    with fake_gpu.on_stream(7):
        pass  # Operators can be captured.
