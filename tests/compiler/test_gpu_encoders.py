"""Whole encoders on the emulated GPU, compared with PyTorch in float64."""

import re

import pytest
import torch
from torch import nn

from dcnv3_tvm import compile_artifact, frontend
from dcnv3_tvm import gpu as gpu_constants
from dcnv3_tvm.verify.compare import difference
from dcnv3_tvm.verify.random_weights import randomize_
from emulated_gpu import EmulatedGpu
from helpers.encoders import gpu_launches, random_encoder

PRE_NORM = "test_internimage_pre_norm"
SHAPE = (1, 3, 32, 96)


@pytest.fixture
def compile_on_gpu(gpu, tmp_path):
    def compile_to_folder(imported, dtype, target="cuda-sm90"):
        path = tmp_path / "model"
        with gpu.compiling():
            metadata = compile_artifact(imported, path, target=target, dtype=dtype)
        return path, metadata

    return compile_to_folder


def assert_agrees(outputs, reference, dtype):
    assert [len(outputs[entry]) for entry in ("main", "features")] == [1, 4]
    for entry, expected in reference.items():
        for output, value in zip(outputs[entry], expected, strict=True):
            found = difference(entry, output, value)
            assert found.within(dtype)
            # Matmuls with operands of a half type leave a larger error than float32.
            assert dtype == "float32" or found.norm > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (PRE_NORM, "float32"),
        # Attention pooling and center-feature scaling.
        ("test_internimage_res_post_norm", "float16"),
        ("test_internimage_post_norm", "bfloat16"),
    ],
)
def test_encoder(name, dtype, gpu, compile_on_gpu):
    _, imported, image, reference = random_encoder(name, SHAPE)
    path, _ = compile_on_gpu(imported, dtype)
    assert_agrees(gpu.run_model(path, [image]), reference, dtype)
    # Kernels that read the image or write a result stay outside of the CUDA graph, because these
    # tensors move between calls.
    launches = gpu.call(gpu_launches, path, image)
    assert launches["main"] == ["launch", "graph", "launch"]
    assert launches["features"] == ["launch", "graph"] + 4 * ["launch"]


class OneStage(nn.Module):
    """Every kind of kernel of an encoder: the other stages repeat them with other widths."""

    def __init__(self):
        super().__init__()
        whole = randomize_(frontend.create_model(PRE_NORM), 1)
        first, self.stage, *_ = whole.levels
        self.stem = nn.Sequential(whole.patch_embed, first.downsample)

    def forward(self, image):
        return self.stage(self.stem(image)).mean((1, 2))


def assert_stage_agrees(outputs, model, image):
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(image).double())
    model.float()
    (output,) = outputs["main"]
    assert difference("main", output, expected.numpy()).within("float16")


@pytest.mark.slow
def test_dynamic_batch_and_size(gpu, compile_on_gpu, rng):
    model = OneStage()
    imported = frontend.import_model(model, example=SHAPE, dynamic_batch=True, dynamic_size=True)
    path, metadata = compile_on_gpu(imported, "float16")
    rules = metadata.kernels
    assert {"gemm", "depthwise", "layer_norm", "dcnv3"} < set(rules.values())
    fallback = {name for name, rule in rules.items() if rule == "fallback"}
    assert fallback
    assert all(re.search("cast|transpose|mean", name) for name in fallback), fallback
    for shape in (SHAPE, (2, 3, 37, 75)):
        image = rng.standard_normal(shape).astype("float32")
        assert_stage_agrees(gpu.run_model(path, [image]), model, image)


@pytest.mark.slow
def test_schedules_of_large_batches(compile_on_gpu, monkeypatch, rng):
    """Both matmuls of an MLP in one kernel, and several threads per DCNv3 output vector."""
    monkeypatch.setattr(gpu_constants, "FULL_GPU_BLOCKS", 0)
    monkeypatch.setattr(gpu_constants, "FULL_GPU_THREADS", 0)
    model = OneStage()
    imported = frontend.import_model(model, example=SHAPE)
    path, metadata = compile_on_gpu(imported, "float16", "cuda-sm80")
    assert "mlp" in metadata.kernels.values()
    image = rng.standard_normal(SHAPE).astype("float32")
    with EmulatedGpu("sm_80") as sm80:
        assert_stage_agrees(sm80.run_model(path, [image]), model, image)
