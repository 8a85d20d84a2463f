"""Render the README of an artifact."""

from __future__ import annotations

from collections.abc import Sequence

from dcnv3_tvm.errors import FFI
from dcnv3_tvm.runtime.metadata import ArtifactMetadata
from dcnv3_tvm.signature import TensorInfo, parse_size


def render(metadata: ArtifactMetadata) -> str:
    """Return the Markdown text for complete metadata."""
    sections = [
        f"# {metadata.name}",
        f"Compiled for `{metadata.target.slug}` in {metadata.dtype} by dcnv3-tvm "
        f"{metadata.versions.get('dcnv3_tvm', '?')} (TVM {metadata.versions.get('tvm', '?')}) on "
        f"{metadata.created}{_weights(metadata)}.",
        *_system(metadata),
        "Running processes map the weights into memory: replace or remove the folder as a whole, "
        "but do not overwrite its files in place.",
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
        for size, values in {"": metadata.preprocessing, **metadata.sizes}.items():
            settings = [f"- `{name}`: {value}" for name, value in values.items()]
            sections += [f"## Preprocessing {size}".rstrip(), "\n".join(settings)]
    if metadata.labels:
        sections += [
            "## Labels",
            f"`model.metadata.labels` names the {len(metadata.labels)} classes: "
            f"`top_k(result, labels=model.metadata.labels)` of `dcnv3_tvm.runtime`.",
        ]
    return "\n\n".join(sections) + "\n"


def _weights(metadata: ArtifactMetadata) -> str:
    source = metadata.config.get("weights")
    return "" if source is None else f", with {source}"


def _system(metadata: ArtifactMetadata) -> list[str]:
    """Say where it runs, and what has to be installed there."""
    system = metadata.target.system
    name = metadata.target.triple if system is None else f"{system.name} ({metadata.target.triple})"
    packages = [f'"{FFI}"', "numpy", "pillow"]
    lines = [f"It runs on {name or 'this system'}, and needs neither PyTorch nor TVM's compiler."]
    if not metadata.libraries:
        tvm = f"apache-tvm=={metadata.versions.get('tvm')}"
        packages.append(tvm)
        lines.append(
            f"TVM's runtime library for this system is not in the folder: `{tvm}` has it. If "
            "TVM's compiler is not wanted there, compile the model again with `--runtime-wheel`."
        )
    return [
        "\n".join(lines),
        "```sh\npip install --no-deps dcnv3-tvm  # or the path of its wheel\n"
        f"pip install {' '.join(packages)}\n```",
    ]


def _gpu(metadata: ArtifactMetadata) -> list[str]:
    if metadata.target.kind != "cuda":
        return []
    return [
        f"It runs on NVIDIA GPUs of architecture {metadata.target.arch}, with a driver for CUDA 13 "
        "and CUDA's runtime library: the package `nvidia-cuda-runtime` 13, which PyTorch for CUDA "
        "13 installs, or the CUDA toolkit."
    ]


def _example(metadata: ArtifactMetadata) -> str:
    values = {
        tensor.name.replace(".", "_"): f'np.zeros({_example_shape(tensor)}, "{tensor.dtype}")'
        for tensor in metadata.entries["main"].inputs
    }
    if metadata.preprocessing:
        values[next(iter(values))] = 'model.preprocess("photo.jpg")' + _sizes(metadata)
    arguments = ", ".join(values)
    lines = [
        "```python",
        *(["import numpy as np"] if any("np." in value for value in values.values()) else []),
        "from dcnv3_tvm import runtime",
        'model = runtime.load(".")  # this folder',
        *(f"{name} = {value}" for name, value in values.items()),
    ]
    if metadata.feature_entry != "main":
        lines.append(f"result = model({arguments})")
    if metadata.feature_entry is not None:
        lines.append(f"maps = model.features({arguments})")
    return "\n".join([*lines, "```"])


def _sizes(metadata: ArtifactMetadata) -> str:
    if not metadata.sizes:
        return ""
    first, *others = ("({}, {})".format(*size) for size in metadata.image_sizes)
    return f"  # size={first}; or {', '.join(others)}"


def _example_shape(tensor: TensorInfo) -> tuple[int, ...]:
    return tuple(parse_size(size)[0] if isinstance(size, str) else size for size in tensor.shape)


def _table(rows: Sequence[tuple[str, TensorInfo]]) -> str:
    lines = ["| | name | shape | layout | dtype | stride |", "|---|---|---|---|---|---|"]
    for role, tensor in rows:
        shape = ", ".join(str(size) for size in tensor.shape)
        stride = "" if tensor.stride is None else str(tensor.stride)
        lines.append(
            f"| {role} | {tensor.name} | {shape} | {tensor.layout} | {tensor.dtype} | {stride} |"
        )
    return "\n".join(lines)
