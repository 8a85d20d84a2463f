"""The operators and the toy model of `tests/runtime/test_gpu.py`, also where TVM is not installed.

There they are read from the folder that `benchmarks/gpu_first_contact.py prepare` compiled.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm.runtime import kernel_runtime, library
from dcnv3_tvm.runtime.kernel import Kernel, KernelLibrary
from dcnv3_tvm.runtime.loading import read_metadata
from dcnv3_tvm.runtime.metadata import TargetInfo
from dcnv3_tvm.spec import DCNv3Spec
from helpers.toy import Toy

FOLDER: Final = "DCNV3_TVM_FIRST_CONTACT"
"""Environment variable of the folder."""

HAS_TVM: Final = library.installed_runtime() is not None

DTYPES: Final = ("float32", "float16", "bfloat16")
SHAPES: Final[tuple[tuple[tuple[int, int, int, int], int, dict[str, Any]], ...]] = (
    ((2, 13, 11, 64), 4, {}),
    ((1, 9, 14, 96), 3, {"offset_scale": 2.0}),
    ((1, 8, 9, 48), 4, {"kernel_size": (3, 5), "stride": (2, 1), "pad": (1, 0)}),
)
"""Shape, groups and further parameters of operators."""

UNALIGNED: Final = DCNv3Spec.of((1, 7, 5, 64), group=4, dtype="float16")
SQUARE: Final = DCNv3Spec.of((1, 9, 9, 64), group=4)


def operators() -> list[DCNv3Spec]:
    """Return all operators that the tests run on a GPU."""
    return [
        *(
            DCNv3Spec.of(shape, group=group, dtype=dtype, softmax=softmax, **more)
            for shape, group, more in SHAPES
            for dtype in DTYPES
            for softmax in (False, True)
        ),
        UNALIGNED,
        SQUARE,
    ]


def folder() -> Path:
    """Return the folder; raises an error if the variable is not set."""
    return Path(os.environ[FOLDER])


def read_kernel(kind: str, spec: DCNv3Spec, *_: Any) -> Kernel:
    """Do as `dcnv3_tvm.compiler.compile_kernel` does when it compiles."""
    kernel_runtime.load_runtime(folder() / "lib")
    code = (folder() / "operators" / f"{spec.slug.replace('dcnv3', kind, 1)}.so").read_bytes()
    target = read_metadata(folder() / "toy").target
    return Kernel(kind, TargetInfo("cuda", arch=target.arch), KernelLibrary(code, on_gpu=True))


class PrebuiltToy(Toy):
    """The toy model in the folder."""

    @classmethod
    def read(cls) -> PrebuiltToy:
        """Read what the tests need of it."""
        with np.load(folder() / "expected" / "toy-weights.npz") as stored:
            return cls(b"", dict(stored), read_metadata(folder() / "toy"))

    def write(self, destination: Path, **_: Any) -> Path:
        """Copy the artifact."""
        shutil.copytree(folder() / "toy", destination)
        return destination
