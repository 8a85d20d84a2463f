"""The text files of a bundle."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Final

from dcnv3_tvm.errors import MissingDependencyError
from dcnv3_tvm.runtime.metadata import ArtifactMetadata

PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The version of Python that the pinned packages are installed for."""

_CUDA: Final = "nvidia-cuda-runtime>=13,<14"
_DOCKER_PLATFORMS: Final = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}


def requirements(metadata: ArtifactMetadata) -> str:
    """Return a requirements file with the packages that an artifact needs, as installed here.

    Raises
    ------
    MissingDependencyError
        If one of them is not installed.
    """
    tensors = [t for entry in metadata.entries.values() for t in (*entry.inputs, *entry.outputs)]
    needed = {
        "apache-tvm-ffi": True,
        "numpy": True,
        "ml_dtypes": any(tensor.dtype == "bfloat16" for tensor in tensors),
        "pillow": bool(metadata.preprocessing),
    }
    lines = [f"{name}=={_version(name)}" for name, wanted in needed.items() if wanted]
    return "\n".join(lines + ([_CUDA] if metadata.target.kind == "cuda" else [])) + "\n"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"{package}, which the artifact needs, is not installed here",
            hint=f"Run: pip install {package}",
        ) from error


def dockerfile() -> str:
    """Return a Dockerfile that makes an image of the bundle's folder."""
    return f"""\
FROM python:{PYTHON}-slim
WORKDIR /model
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN python -m compileall -q .
USER nobody
ENTRYPOINT ["python", "run.py"]
"""


def is_for_linux(metadata: ArtifactMetadata) -> bool:
    """Whether an artifact runs on Linux, and so in a container."""
    return _operating_system(metadata) == "linux"


def _operating_system(metadata: ArtifactMetadata) -> str:
    system = metadata.target.system
    return "linux" if system is None else system.operating_system


def readme(metadata: ArtifactMetadata, sizes: Mapping[str, int]) -> str:
    """Return the README of a bundle.

    Parameters
    ----------
    metadata : ArtifactMetadata
        Of the artifact.
    sizes : mapping of str to int
        Bytes by the name of each part.
    """
    python, run = f"python{PYTHON}", ".venv/bin/python"
    if _operating_system(metadata) == "windows":
        python, run = f"py -{PYTHON}", r".venv\Scripts\python"
    parts = "\n".join(f"| `{part}` | {size / 1e6:.1f} MB |" for part, size in sizes.items())
    return f"""\
# {metadata.name}

{metadata.name} in {metadata.dtype}, compiled for `{metadata.target.slug}`. This folder needs Python
{PYTHON} and the packages of `requirements.txt`; neither PyTorch nor TVM's compiler.

```sh
{python} -m venv .venv
{run} -m pip install -r requirements.txt
{run} run.py photo.jpg --top 3     # --json for a JSON object for each image
```
{_container(metadata) if is_for_linux(metadata) else ""}
From Python, with this folder in `sys.path`:

```python
from dcnv3_tvm import runtime

model = runtime.load("artifact")
result = model(model.preprocess("photo.jpg"))
```

| part | size |
|---|---|
{parts}
"""


def _container(metadata: ArtifactMetadata) -> str:
    image = metadata.name.lower().replace("_", "-")
    platform = _DOCKER_PLATFORMS.get(metadata.target.architecture)
    build = f"docker build {f'--platform {platform} ' if platform else ''}-t {image} ."
    gpu = " --gpus all" if metadata.target.kind == "cuda" else ""
    return f"""
As a container:

```sh
{build}
docker run --rm{gpu} -v "$PWD:/data:ro" {image} /data/photo.jpg
```
"""
