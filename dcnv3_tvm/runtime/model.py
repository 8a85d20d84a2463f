"""A compiled model in memory, callable with an image for logits or feature maps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm import checks, files
from dcnv3_tvm.digests import digest_of_file
from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.errors import (
    ArtifactError,
    DCNv3Error,
    InvalidArgumentError,
    first_line,
    os_reason,
)
from dcnv3_tvm.runtime import cuda, image, library, tensors
from dcnv3_tvm.runtime.arguments import Arguments, choose_entry, in_order
from dcnv3_tvm.runtime.execution import CpuExecution, Execution, Functions, GpuExecution
from dcnv3_tvm.runtime.metadata import (
    CARD,
    FILES,
    LIBRARY,
    METADATA,
    WEIGHTS,
    ArtifactMetadata,
)
from dcnv3_tvm.runtime.open_image import Source
from dcnv3_tvm.runtime.profile import SET_INSTRUMENT, Profile
from dcnv3_tvm.signature import BATCH, MAIN, OFFSETS, Entry

_MAX_CALLS: Final = 10_000


class CompiledModel:
    """A compiled model in memory; made by `dcnv3_tvm.load` and `dcnv3_tvm.compile_model`.

    It may be called from several threads: `workers` calls run side by side, others wait. On the CPU
    it may also be called in a forked child. Pickling and copying it loads its saved artifact again.
    Results stay valid after the model is closed.

    Examples
    --------
    >>> model = dcnv3_tvm.load("internimage_t")  # doctest: +SKIP
    >>> logits = model(model.preprocess("photo.jpg"))  # doctest: +SKIP
    >>> c2, c3, c4, c5 = model.features(model.preprocess("photo.jpg"))  # doctest: +SKIP
    """

    def __init__(
        self,
        executables: library.Executables,
        weights: dict[str, Any],
        metadata: ArtifactMetadata,
        *,
        folder: Path,
        threads: int,
        reload: Callable[[Path], CompiledModel],
        gpu: cuda.Gpu | None = None,
        owner: object | None = None,
    ) -> None:
        self.metadata = metadata
        """Description of the artifact."""
        self.threads = threads
        self.workers = len(executables.machines)
        """Number of calls that run side by side."""
        self.device = "cpu" if gpu is None else gpu.name
        """Device it runs on, for example ``"cpu"`` or ``"cuda:0"``."""
        self._gpu = gpu
        self._weight_bytes = tensors.total_bytes(weights.values())
        self._folder = folder
        self._owner = owner
        self._reload = reload
        self._saved = None if owner is not None else folder
        workers = [_functions(machine, weights, metadata) for machine in executables.machines]
        self._execution: Execution = (
            CpuExecution(workers, pooled=executables.pooled)
            if gpu is None
            else GpuExecution(workers[0], gpu)
        )

    @property
    def threads(self) -> int:
        """Number of CPU threads of a call; it may be changed."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._threads = checks.integer("threads", count, low=1, high=library.MAX_THREADS)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the model.

        Parameters
        ----------
        *inputs, **named : numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
            By position or by name, as specified by ``metadata.entries["main"].inputs``, usually an
            NCHW image, of one of ``metadata.image_sizes``. Used in place if contiguous and aligned
            to 64 bytes, as from `preprocess` and PyTorch, copied otherwise. A dynamic batch may be
            empty. A model on a GPU takes tensors on that GPU, runs on the caller's current stream
            and returns before it is done, as PyTorch does; NumPy arrays are copied to the GPU, and
            the result back.

        Returns
        -------
        array or dict of str to array
            Of the kind of the first input; a dict by name if there are several outputs.

        Raises
        ------
        InvalidArgumentError
            If an input is missing, has the wrong rank, shape, layout or element type, or is on
            another device.
        DeviceError
            If the GPU has too little free memory, or fails.
        """
        outputs = self._run(MAIN, inputs, named)
        if len(outputs) == 1:
            return outputs[0]
        return dict(zip(self.output_names(), outputs, strict=True))

    def features(self, *inputs: Any, **named: Any) -> list[Any]:
        """Return the feature pyramid: NCHW maps, finest first.

        Parameters
        ----------
        *inputs, **named : numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
            As in a call.

        Raises
        ------
        InvalidArgumentError, DeviceError
            As in a call, and if the model was compiled without feature maps.
        """
        name = self.metadata.feature_entry
        if name is None:
            raise InvalidArgumentError(
                "the artifact has no feature maps",
                got=f"outputs {', '.join(self.output_names())}",
                hint="Compile with --features-only, or import a create_model(..., "
                "features_only=True).",
            )
        return self._run(name, inputs, named)

    def offsets(self, *inputs: Any, **named: Any) -> list[tuple[Any, Any]]:
        """Return offset and mask of each DCNv3, in the order in which they run.

        Parameters
        ----------
        *inputs, **named : numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
            As in a call.

        Returns
        -------
        list of (array, array)
            Offsets (N, Ho, Wo, group*P*2), x before y, in pixels before ``offset_scale``; and the
            weights of the points after the softmax, (N, Ho, Wo, group*P).
            ``metadata.entries["offsets"].blocks`` has their parameters.

        Raises
        ------
        InvalidArgumentError, DeviceError
            As in a call, and if the model was compiled without exposed offsets.
        """
        if OFFSETS not in self.metadata.entries:
            raise InvalidArgumentError(
                "the artifact does not expose its offsets",
                got=f"entries {', '.join(self.metadata.entries)}",
                hint='Compile with --expose offsets, or compile_model(..., expose="offsets").',
            )
        outputs = self._run(OFFSETS, inputs, named)
        return list(zip(outputs[::2], outputs[1::2], strict=True))

    def warm_up(self) -> None:
        """Call each entry once with zeros, as `load` does with ``warm_up=True``.

        Then the first call of the caller is as fast as later ones: kernels are loaded, memory is
        allocated for each of the `workers` that is free, and on a GPU graphs are captured. A
        dynamic batch is one image; entries with other dynamic sizes are left out.
        """
        for name, entry in self.metadata.entries.items():
            shapes = [
                [1 if size == BATCH else size for size in info.shape] for info in entry.inputs
            ]
            if all(isinstance(size, int) for shape in shapes for size in shape):
                zeros = [
                    np.zeros(tuple(map(int, shape)), numpy_dtype(info.dtype))
                    for shape, info in zip(shapes, entry.inputs, strict=True)
                ]
                for _ in range(self.workers):
                    self._run_entry(name, zeros, rotate=True)

    def profile(self, *inputs: Any, calls: int = 10, **named: Any) -> Profile:
        """Time the kernels within calls of the model, on the CPU.

        Whole calls alternate with calls in which the virtual machine reports each kernel, which
        takes some 10 us more a kernel. Other calls of the model may run in between.

        Parameters
        ----------
        *inputs, **named : numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
            As in a call.
        calls : int
            Number of calls to measure, after two that do not count.

        Raises
        ------
        InvalidArgumentError
            As in a call, and if the model is on a GPU.
        """
        calls = checks.integer("calls", calls, low=1, high=_MAX_CALLS)
        if not isinstance(self._execution, CpuExecution):
            raise InvalidArgumentError(
                "kernels are timed on the CPU only",
                got=f"a model on {self.device}",
                hint="On a GPU, use NVIDIA's profiler: nsys profile dcnv3-tvm run ARTIFACT IMAGE",
            )
        name, ordered = self._chosen(MAIN, inputs, named)
        arguments = Arguments(ordered, self._entry(name).inputs, self._gpu)
        try:
            return self._execution.profile(
                name, self.metadata, arguments, calls=calls, threads=self.threads
            )
        except DCNv3Error:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise self._failure(error, name) from error

    def output_names(self, entry: str = MAIN) -> list[str]:
        """Return the names of an entry's outputs."""
        return [output.name for output in self._entry(entry).outputs]

    def preprocess(
        self,
        source: Source | Sequence[Source],
        *,
        size: int | tuple[int, int] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """Convert one image or several to the input: a normalized NCHW batch.

        Parameters
        ----------
        source : path, bytes, open binary file, PIL.Image.Image, array, or a list of these
            Of any size. An array is of shape (H, W, 3), RGB, or (H, W).
        size : int or (int, int), optional
            Height and width of the result, in a model of several image sizes or of a dynamic one;
            by default the first.
        value_range : (float, float), optional
            Values of black and of white in images of 32-bit integers or floats.

        Raises
        ------
        ImageError
            If a source is not an image; in a list, it is named by its index.
        InvalidArgumentError
            If the artifact does not specify the preprocessing, or takes no images of `size`.
        """
        wanted = None if size is None else checks.pair("size", size, low=1)
        return image.preprocess(
            source,
            self.metadata.preprocessing_for(wanted),
            dtype=self._entry(MAIN).inputs[0].dtype,
            value_range=value_range,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the artifact to a folder, atomically.

        An artifact at `path` is replaced, and remains unchanged if anything fails.

        Raises
        ------
        ArtifactError
            If `path` holds something else or cannot be written, or the copy differs.
        """
        destination = checks.path("path", path)
        if not (destination.exists() and destination.samefile(self._folder)):
            checks.outside("the copy", destination, self._folder)
        check_replaceable(destination)
        try:
            with files.atomic_folder(destination) as temporary:
                for name in (LIBRARY, WEIGHTS, *self.metadata.libraries, CARD, METADATA):
                    shutil.copyfile(self._folder / name, temporary / name)
                    expected = self.metadata.digests.get(name)
                    if expected is not None and digest_of_file(temporary / name) != expected:
                        raise ArtifactError(
                            f"{name} was changed after the model was loaded", got=self._folder
                        )
        except OSError as error:
            raise ArtifactError(
                "the artifact cannot be saved",
                got=os_reason(error, destination),
                hint=f"{destination} is unchanged.",
            ) from error
        self._saved = destination.absolute()

    def close(self) -> None:
        """Release code, weights and temporary files; later calls raise an error.

        On a GPU this frees the memory, except that of results still in use.
        """
        self._execution.close()
        self._owner = None

    def __enter__(self) -> CompiledModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._saved is None:
            raise ArtifactError(
                "the model was not saved, so it cannot be pickled or copied",
                got=repr(self),
                hint="Call model.save(path) first: it is loaded from that folder again.",
            )
        return _load_again, (self._reload, self._saved, self.metadata.digests)

    def __repr__(self) -> str:
        signature = ", ".join(info.describe() for info in self._entry(MAIN).inputs)
        return f"<CompiledModel {self.metadata.name} for {self.metadata.target.slug}: {signature}>"

    def _entry(self, name: str) -> Entry:
        try:
            return self.metadata.entries[name]
        except (KeyError, TypeError):
            raise InvalidArgumentError(
                "the model has no such entry",
                got=repr(name),
                allowed=", ".join(self.metadata.entries),
            ) from None

    def _chosen(
        self, function: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> tuple[str, list[Any]]:
        """Return the entry of a function for the size of the image, and the inputs in order."""
        ordered = in_order(inputs, named, self._entry(function).inputs)
        if not self.metadata.sizes:
            return function, ordered
        return choose_entry(self.metadata.entries_of(function), ordered[0]), ordered

    def _run(self, function: str, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        return self._run_entry(*self._chosen(function, inputs, named))

    def _run_entry(self, name: str, inputs: Sequence[Any], *, rotate: bool = False) -> list[Any]:
        entry = self._entry(name)
        arguments = Arguments(inputs, entry.inputs, self._gpu)
        try:
            result = self._execution.run(name, arguments, self.threads, rotate=rotate)
        except DCNv3Error:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise self._failure(error, name) from error
        outputs = flatten(result)
        if len(outputs) != len(entry.outputs):
            raise ArtifactError(
                f"the code returns other outputs than {METADATA} describes",
                got=f"{len(outputs)} outputs of {name}",
                hint="Compile the model again.",
            )
        return [
            arguments.from_kernel(tensor, info)
            for tensor, info in zip(outputs, entry.outputs, strict=True)
        ]

    def _failure(self, error: Exception, name: str) -> DCNv3Error:
        if self._gpu is not None:
            # The entries share memory for intermediate results.
            known = self.metadata.activation_bytes
            activations = max(known.values()) if name in known else None
            needed = cuda.needed_memory(self._weight_bytes, activations)
            gpu_error = self._gpu.translate_error(error, needed=needed)
            if gpu_error is not None:
                return gpu_error
        return InvalidArgumentError("the compiled model rejects the input", got=first_line(error))


def _load_again(
    reload: Callable[[Path], CompiledModel], folder: Path, digests: dict[str, str]
) -> CompiledModel:
    """Load what was pickled."""
    model = reload(folder)
    if model.metadata.digests != digests:
        raise ArtifactError(
            "the artifact was replaced after the model was pickled",
            got=folder,
            hint="Load it with dcnv3_tvm.load, and pickle it again.",
        )
    return model


def _functions(machine: Any, weights: dict[str, Any], metadata: ArtifactMetadata) -> Functions:
    """Return the functions of a virtual machine, bound to their weights."""
    functions = {SET_INSTRUMENT: machine[SET_INSTRUMENT]}
    for name, entry in metadata.entries.items():
        try:
            function = machine[name]
        except AttributeError as error:
            raise ArtifactError(
                f"{LIBRARY} has no function {name!r}", hint="Compile the model again."
            ) from error
        functions[name] = _bind(function, [weights[weight] for weight in entry.weights])
    return functions


def _bind(function: Any, weights: list[Any]) -> Callable[..., Any]:
    return lambda *inputs: function(*inputs, *weights)


def flatten(result: Any) -> list[Any]:
    """Return the tensors of a result, which may be nested TVM arrays, in order."""
    if hasattr(result, "__dlpack__"):
        return [result]
    return [tensor for item in result for tensor in flatten(item)]


def check_replaceable(destination: Path) -> None:
    """Check that a destination is free, an empty folder or an artifact.

    Raises
    ------
    ArtifactError
        If it is something else, which must not be replaced.
    """
    files.check_replaceable(destination, "an artifact", required=[METADATA], allowed=FILES)
