"""The README of an artifact."""

from __future__ import annotations

from collections.abc import Sequence

from dcnv3_tvm.runtime.metadata import ArtifactMetadata
from dcnv3_tvm.signature import TensorInfo


def render(metadata: ArtifactMetadata) -> str:
    """Return the card's Markdown text.

    Parameters
    ----------
    metadata : ArtifactMetadata
        Complete, with versions and date.
    """
    sections = [
        f"# {metadata.name}",
        f"Compiled with dcnv3-tvm {metadata.versions.get('dcnv3_tvm', '?')} (TVM "
        f"{metadata.versions.get('tvm', '?')}) on {metadata.created}, in {metadata.dtype}, for "
        f"`{metadata.target.slug}`.",
        "It runs with the packages `dcnv3-tvm`, `apache-tvm-ffi`, `numpy` and `pillow`; neither "
        "PyTorch nor TVM's compiler is needed. Processes that run it have its weights mapped: "
        "replace or remove this folder, but do not overwrite its files in place.",
        *_gpu(metadata),
        "## Run it",
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
        settings = "\n".join(f"- {name}: {value}" for name, value in metadata.preprocessing.items())
        sections += ["## Preprocessing", settings]
    return "\n\n".join(sections) + "\n"


def _gpu(metadata: ArtifactMetadata) -> list[str]:
    if metadata.target.kind != "cuda":
        return []
    return [
        f"It is for NVIDIA GPUs of architecture {metadata.target.arch}, with a driver for CUDA 13, "
        "and needs CUDA's runtime library: the package `nvidia-cuda-runtime` 13, which PyTorch for "
        "CUDA 13 brings along, or the toolkit."
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
    lines = ["| | name | shape | layout | type | stride |", "|---|---|---|---|---|---|"]
    for role, tensor in rows:
        shape = ", ".join(str(size) for size in tensor.shape)
        stride = "" if tensor.stride is None else str(tensor.stride)
        lines.append(
            f"| {role} | {tensor.name} | {shape} | {tensor.layout} | {tensor.dtype} | {stride} |"
        )
    return "\n".join(lines)
