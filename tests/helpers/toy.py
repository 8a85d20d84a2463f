"""A small artifact that compiles in a fraction of a second."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm.machine import architecture
from dcnv3_tvm.preprocessing import size_settings
from dcnv3_tvm.runtime import ArtifactMetadata, TargetInfo
from dcnv3_tvm.signature import Entry, TensorInfo, size_name, sized_entry
from dcnv3_tvm.systems import this_system

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
    """A model of images of 64 pixels: logits relu(x) + bias, feature maps x + bias and relu(x).

    Parameters
    ----------
    code : bytes
        The compiled library.
    weights : dict of str to numpy.ndarray
        The weight ``bias``.
    metadata : ArtifactMetadata
        Metadata without digests, versions and date.
    """

    code: bytes
    weights: dict[str, np.ndarray]
    metadata: ArtifactMetadata

    @classmethod
    def build(
        cls,
        batch: int | str = 1,
        *,
        features_only: bool = False,
        arch: str | None = None,
        cuda_graph: bool = True,
        target: str | None = None,
        sizes: Sequence[tuple[int, int]] = ((8, 8),),
        pooled: bool = True,
    ) -> Toy:
        """Compile the model for any CPU of this architecture, for a GPU, or for another system.

        Parameters
        ----------
        batch : int or str
            Batch size; a string makes it dynamic.
        features_only : bool
            Return the feature maps instead of logits from the entry ``"main"``.
        arch : str, optional
            Architecture of the GPU, such as ``"sm_90"``, which needs a static batch size.
        cuda_graph : bool
            Whether the GPU runs intermediate kernels as a CUDA graph.
        target : str, optional
            Name of a CPU target, for another system.
        sizes : sequence of (int, int)
            Height and width of the images, of 64 pixels each.
        pooled : bool
            Link this package's thread pool, where there is one; else loops run on TVM's.
        """
        import tvm

        from dcnv3_tvm.compiler.linker import find_linker

        module = _module(batch, features_only, sizes)
        metadata = _metadata(batch, features_only, sizes)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.so"
            if target is not None:
                metadata = _build_for_target(module, metadata, target, path)
            elif arch is None:
                linker = find_linker(this_system())
                linker = linker if pooled else dataclasses.replace(linker, thread_pool=b"")
                executable = tvm.compile(module, tvm.target.Target("llvm"))
                executable.export_library(str(path), fcompile=linker)
            else:
                metadata = _build_for_gpu(module, metadata, arch, path, cuda_graph)
            code = path.read_bytes()
        bias = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
        return cls(code, {"bias": bias}, metadata)

    def main(self, x: np.ndarray) -> np.ndarray:
        """Compute the exact output of the entry ``"main"``."""
        result: np.ndarray = np.maximum(x, 0) + self.weights["bias"].reshape(x.shape[1:])
        return result.reshape(x.shape[0], -1)

    def write(
        self, destination: Path, *, runtime: Mapping[str, bytes] | None = None, **changes: Any
    ) -> Path:
        """Write the artifact and return its folder.

        Parameters
        ----------
        destination : Path
            The folder.
        runtime : mapping of str to bytes, optional
            TVM's runtime libraries by name; by default the installed ones.
        **changes
            Of the metadata.
        """
        from dcnv3_tvm.compiler import artifact

        artifact.write(
            destination,
            library=self.code,
            weights=self.weights,
            metadata=dataclasses.replace(self.metadata, **changes),
            runtime=runtime,
        )
        return destination


def _build_for_target(
    module: Any, metadata: ArtifactMetadata, target: str, path: Path
) -> ArtifactMetadata:
    import tvm

    from dcnv3_tvm import targets
    from dcnv3_tvm.compiler.linker import find_linker, system_to_build
    from dcnv3_tvm.compiler.target_info import target_info

    resolved = targets.resolve_target(target)
    linker = find_linker(system_to_build(resolved))
    tvm.compile(module, resolved).export_library(str(path), fcompile=linker)
    return dataclasses.replace(metadata, target=target_info(resolved))


def _build_for_gpu(
    module: Any, metadata: ArtifactMetadata, arch: str, path: Path, cuda_graph: bool
) -> ArtifactMetadata:
    import tvm
    from tvm import relax

    from dcnv3_tvm import targets
    from dcnv3_tvm.compiler import compile as compiler
    from dcnv3_tvm.compiler import pipeline
    from dcnv3_tvm.transform.ir import Program

    target = targets.resolve_target(f"cuda -arch={arch}")
    legal = relax.transform.LegalizeOps()(module)
    scheduled = tvm.IRModule(
        {
            var: func.with_attr("num_input", 1)
            if isinstance(func, relax.Function)
            else _one_thread_per_element(func)
            for var, func in legal.functions_items()
        }
    )
    planned, activations = pipeline.plan_memory(Program(scheduled, metadata.entries, {}), target)
    compiler.build_library(planned, target, path, cuda_graph=cuda_graph)
    return dataclasses.replace(
        metadata, target=compiler.target_info(target), activation_bytes=activations
    )


def _one_thread_per_element(func: Any) -> Any:
    from tvm import s_tir

    schedule = s_tir.Schedule(func)
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        elements = schedule.fuse(*schedule.get_loops(block))
        blocks, threads = schedule.split(elements, [None, 64])
        schedule.bind(blocks, "blockIdx.x")
        schedule.bind(threads, "threadIdx.x")
    return schedule.mod["main"]


def _module(batch: int | str, features_only: bool, sizes: Sequence[tuple[int, int]]) -> Any:
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    count = tvm.tirx.Var(batch, "int64") if isinstance(batch, str) else batch

    def parameters(size: tuple[int, int]) -> tuple[Any, Any]:
        x = relax.Var("image", relax.TensorType((count, 3, *size), "float32"))
        return x, relax.Var("bias", relax.TensorType((3, 8, 8), "float32"))

    def shaped(bias: Any, size: tuple[int, int]) -> Any:
        return bias if size == (8, 8) else relax.op.reshape(bias, (3, *size))

    for size in sizes:
        if not features_only:
            x, bias = parameters(size)
            with builder.function(_entry_name("main", size, sizes), [x, bias]):
                with builder.dataflow():
                    summed = relax.op.add(relax.op.nn.relu(x), shaped(bias, size))
                    result = builder.emit_output(relax.op.reshape(summed, (count, 192)))
                builder.emit_func_output(result)
        x, bias = parameters(size)
        name = "main" if features_only else "features"
        with builder.function(_entry_name(name, size, sizes), [x, bias]):
            with builder.dataflow():
                maps = [relax.op.add(x, shaped(bias, size)), relax.op.nn.relu(x)]
                result = builder.emit_output(relax.Tuple(maps))
            builder.emit_func_output(result)
    return builder.get()


def _entry_name(function: str, size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> str:
    return function if size == sizes[0] else sized_entry(function, size_name(size))


def _metadata(
    batch: int | str, features_only: bool, sizes: Sequence[tuple[int, int]]
) -> ArtifactMetadata:
    entries = {}
    for size in sizes:
        shape = (batch, 3, *size)
        image = TensorInfo("image", shape, "float32", "NCHW")
        maps = tuple(
            TensorInfo(f"feature_{index}", shape, "float32", "NCHW", stride=4 * 2**index)
            for index in range(2)
        )
        logits = (TensorInfo("logits", (batch, 192), "float32"),)
        functions = {"main": maps} if features_only else {"main": logits, "features": maps}
        for name, outputs in functions.items():
            entries[_entry_name(name, size, sizes)] = Entry((image,), outputs, ("bias",))
    return ArtifactMetadata(
        name="toy",
        entries=entries,
        target=TargetInfo("llvm", f"{architecture()}-linux-gnu", slug="cpu-test", text="llvm"),
        preprocessing=PREPROCESSING | size_settings(list(sizes[0])),
        sizes={size_name(size): PREPROCESSING | size_settings(list(size)) for size in sizes[1:]},
        config={"variant": "toy", "depths": (1, 2)},
    )


def flip(path: Path, position: int) -> None:
    """Change a byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
