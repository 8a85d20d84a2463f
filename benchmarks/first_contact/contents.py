"""Layout of the folder that `prepare` writes and the checks read. Imports no compiler."""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.json_values import decode
from dcnv3_tvm.runtime.metadata import (
    CUDA_LIBRARY,
    METADATA,
    RUNTIME_LIBRARY,
    WEIGHTS,
    TargetInfo,
)

ENCODERS: Final = ("encoder-plain", "encoder-graph")
"""The same small encoder without and with a CUDA graph."""

BENCH_PARTS: Final = ("op", "backward")
"""Parts of ``bench gpu`` that are measured; encoders are checks of their own."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """A compiled kernel of the operator.

    Parameters
    ----------
    name : str
        Name of its files.
    kind : str
        Name of its function.
    inputs, outputs : tuple of str
        Element types of its arguments.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in the folder.

    Parameters
    ----------
    target : TargetInfo
        The GPU it was compiled for.
    operators : tuple of Operator
        Kernels of the operator.
    models : dict of str to str
        Large encoders by name, with the digest of their weights.
    bench : str
        Pattern of the operators that are measured.
    """

    target: TargetInfo
    operators: tuple[Operator, ...]
    models: dict[str, str]
    bench: str


class Contents:
    """The folder.

    Parameters
    ----------
    root : Path
        Its path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest_path = root / "manifest.json"
        self.libraries = root / "lib"
        self.toy = root / "toy"
        self.bench = root / "bench"

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The manifest."""
        data = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        found: Manifest = decode(Manifest, data, "manifest")
        return found

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest."""
        text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
        self.manifest_path.write_text(text, encoding="utf-8")

    def code(self, operator: str) -> Path:
        """Return the path of a kernel's library."""
        return self.root / "operators" / f"{operator}.so"

    def model(self, name: str) -> Path:
        """Return the path of a large encoder."""
        return self.root / "models" / name

    def _packed_weights(self, digest: str) -> Path:
        return self.root / "models" / f"{digest[:16]}.xz"

    def pack(self) -> None:
        """Keep the runtime libraries and weights of artifacts once."""
        for path in self._copies():
            for name in (RUNTIME_LIBRARY, CUDA_LIBRARY):
                (path / name).unlink()
        for name, digest in self.manifest.models.items():
            weights = self.model(name) / WEIGHTS
            if not self._packed_weights(digest).exists():
                packed = lzma.compress(weights.read_bytes(), preset=1)
                self._packed_weights(digest).write_bytes(packed)
            weights.unlink()

    def unpack(self) -> None:
        """Undo `pack`, unless that has been done."""
        for path in self._copies():
            for name in (RUNTIME_LIBRARY, CUDA_LIBRARY):
                if not (path / name).exists():
                    shutil.copyfile(self.libraries / name, path / name)
        for name, digest in self.manifest.models.items():
            weights = self.model(name) / WEIGHTS
            if not weights.exists():
                packed = self._packed_weights(digest).read_bytes()
                weights.write_bytes(lzma.decompress(packed))

    def _copies(self) -> list[Path]:
        """Return the folders that need a copy of the runtime libraries."""
        return [*(path.parent for path in self.root.rglob(METADATA)), self.bench / "runtime"]

    def save(self, name: str, **arrays: np.ndarray) -> None:
        """Write inputs and expected outputs; types that NumPy's format lacks become float32."""
        path = self.root / "expected" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, **{key: _storable(array) for key, array in arrays.items()})

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read inputs and expected outputs."""
        with np.load(self.root / "expected" / f"{name}.npz") as stored:
            return dict(stored)


def _storable(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == numpy_dtype("bfloat16") else array


def numbered(arrays: dict[str, Any], name: str) -> list[np.ndarray]:
    """Return the arrays ``name0``, ``name1``, ..."""
    count = sum(key.rstrip("0123456789") == name for key in arrays)
    return [arrays[f"{name}{index}"] for index in range(count)]
