"""A small artifact, compiled in a fraction of a second, to test everything around it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm.machine import architecture
from dcnv3_tvm.runtime import ArtifactMetadata, TargetInfo
from dcnv3_tvm.signature import Entry, TensorInfo

PREPROCESSING: Final = {
    "resize": 8,
    "crop": [8, 8],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "layout": "NCHW",
}


@dataclasses.dataclass(frozen=True)
class Toy:
    """relu(x) + bias as logits, x + bias and relu(x) as feature maps, of 8x8 images.

    Parameters
    ----------
    code : bytes
        The compiled library.
    weights : dict of str to numpy.ndarray
        The bias.
    metadata : ArtifactMetadata
        Without digests, versions and date.
    """

    code: bytes
    weights: dict[str, np.ndarray]
    metadata: ArtifactMetadata

    @classmethod
    def build(cls, batch: int | str = 1, *, features_only: bool = False) -> Toy:
        """Compile it for any CPU of this architecture.

        Parameters
        ----------
        batch : int or str
            Images in a call; a string leaves that to the run time.
        features_only : bool
            Return the feature maps from the entry ``"main"``, and no logits.
        """
        import tvm

        module = _module(batch, features_only)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.so"
            tvm.compile(module, tvm.target.Target("llvm")).export_library(str(path))
            code = path.read_bytes()
        bias = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
        return cls(code, {"bias": bias}, _metadata(batch, features_only))

    def main(self, x: np.ndarray) -> np.ndarray:
        """Compute what the entry ``"main"`` should return, to the bit."""
        result: np.ndarray = np.maximum(x, 0) + self.weights["bias"]
        return result.reshape(x.shape[0], -1)

    def write(self, destination: Path, **changes: Any) -> Path:
        """Write the artifact, with other metadata where given, and return its folder."""
        from dcnv3_tvm.compiler import artifact

        artifact.write(
            destination,
            library=self.code,
            weights=self.weights,
            metadata=dataclasses.replace(self.metadata, **changes),
        )
        return destination


def _module(batch: int | str, features_only: bool) -> Any:
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    size = tvm.tirx.Var(batch, "int64") if isinstance(batch, str) else batch

    def parameters() -> tuple[Any, Any]:
        x = relax.Var("image", relax.TensorType((size, 3, 8, 8), "float32"))
        return x, relax.Var("bias", relax.TensorType((3, 8, 8), "float32"))

    if not features_only:
        x, bias = parameters()
        with builder.function("main", [x, bias]):
            with builder.dataflow():
                summed = relax.op.add(relax.op.nn.relu(x), bias)
                result = builder.emit_output(relax.op.reshape(summed, (size, 192)))
            builder.emit_func_output(result)
    x, bias = parameters()
    with builder.function("main" if features_only else "features", [x, bias]):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple([relax.op.add(x, bias), relax.op.nn.relu(x)]))
        builder.emit_func_output(result)
    return builder.get()


def _metadata(batch: int | str, features_only: bool) -> ArtifactMetadata:
    shape = (batch, 3, 8, 8)
    image = TensorInfo("image", shape, "float32", "NCHW")
    maps = tuple(
        TensorInfo(f"feature_{index}", shape, "float32", "NCHW", stride=4 * 2**index)
        for index in range(2)
    )
    features = Entry((image,), maps, ("bias",))
    main = Entry((image,), (TensorInfo("logits", (batch, 192), "float32"),), ("bias",))
    return ArtifactMetadata(
        name="toy",
        entries={"main": features} if features_only else {"main": main, "features": features},
        target=TargetInfo("llvm", f"{architecture()}-linux-gnu", slug="cpu-test", text="llvm"),
        preprocessing=PREPROCESSING,
        config={"variant": "toy", "depths": (1, 2)},
    )
