"""Render the README of an artifact."""

from __future__ import annotations

from collections.abc import Sequence

from dcnv3_tvm.runtime.metadata import ArtifactMetadata
from dcnv3_tvm.signature import TensorInfo


def render(metadata: ArtifactMetadata) -> str:
    """Return the Markdown text for complete metadata."""
    sections = [
        f"# {metadata.name}",
        f"Compiled for `{metadata.target.slug}` in {metadata.dtype} by dcnv3-tvm "
        f"{metadata.versions.get('dcnv3_tvm', '?')} (TVM {metadata.versions.get('tvm', '?')}) on "
        f"{metadata.created}{_weights(metadata)}.",
        "It needs the packages `dcnv3-tvm`, `apache-tvm-ffi`, `numpy` and `pillow`, but neither "
        "PyTorch nor TVM's compiler. Running processes map the weights into memory: replace or "
        "remove the folder as a whole, but do not overwrite its files in place.",
        *_gpu(metadata),
        "## Usage",
        _example(metadata),
    ]
    for name, entry in metadata.entries.items():
        sections += [
            f"## Entry `{name}`",
            _table(
                [("input", tensor) for tensor in entry.inputs]
                + [("output", tensor) for tensor in entry.outputs]
            ),
        ]
    sections += ["## Target", f"`{metadata.target.text or metadata.target.slug}`"]
    if metadata.preprocessing:
        settings = [f"- `{name}`: {value}" for name, value in metadata.preprocessing.items()]
        sections += ["## Preprocessing", "\n".join(settings)]
    return "\n\n".join(sections) + "\n"


def _weights(metadata: ArtifactMetadata) -> str:
    source = metadata.config.get("weights")
    return "" if source is None else f", with {source}"


def _gpu(metadata: ArtifactMetadata) -> list[str]:
    if metadata.target.kind != "cuda":
        return []
    return [
        f"It runs on NVIDIA GPUs of architecture {metadata.target.arch}, with a driver for CUDA 13 "
        "and CUDA's runtime library: the package `nvidia-cuda-runtime` 13, which PyTorch for CUDA "
        "13 installs, or the CUDA toolkit."
    ]


def _example(metadata: ArtifactMetadata) -> str:
    if metadata.preprocessing:
        image = 'model.preprocess("photo.jpg")'
    else:
        shape = ", ".join(
            "1" if isinstance(size, str) else str(size)
            for size in metadata.entries["main"].inputs[0].shape
        )
        image = f'np.zeros(({shape}), "{metadata.entries["main"].inputs[0].dtype}")'
    lines = [
        "```python",
        *([] if metadata.preprocessing else ["import numpy as np"]),
        "from dcnv3_tvm import runtime",
        'model = runtime.load(".")  # this folder',
        f"image = {image}",
    ]
    if metadata.feature_entry != "main":
        lines.append("result = model(image)")
    if metadata.feature_entry is not None:
        lines.append("maps = model.features(image)")
    return "\n".join([*lines, "```"])


def _table(rows: Sequence[tuple[str, TensorInfo]]) -> str:
    lines = ["| | name | shape | layout | dtype | stride |", "|---|---|---|---|---|---|"]
    for role, tensor in rows:
        shape = ", ".join(str(size) for size in tensor.shape)
        stride = "" if tensor.stride is None else str(tensor.stride)
        lines.append(
            f"| {role} | {tensor.name} | {shape} | {tensor.layout} | {tensor.dtype} | {stride} |"
        )
    return "\n".join(lines)
