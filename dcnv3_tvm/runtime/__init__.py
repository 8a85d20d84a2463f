"""Load and run compiled models, with neither PyTorch nor a compiler."""

from dcnv3_tvm.runtime.image import preprocess, top_k
from dcnv3_tvm.runtime.loading import load, read_metadata
from dcnv3_tvm.runtime.metadata import ArtifactMetadata, TargetInfo
from dcnv3_tvm.runtime.model import CompiledModel

__all__ = [
    "ArtifactMetadata",
    "CompiledModel",
    "TargetInfo",
    "load",
    "preprocess",
    "read_metadata",
    "top_k",
]
