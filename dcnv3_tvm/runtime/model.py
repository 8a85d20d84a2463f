"""A loaded model: call it with an image, get logits or feature maps."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcnv3_tvm import files
from dcnv3_tvm.errors import ArtifactError, DCNv3Error, InvalidArgumentError, first_line
from dcnv3_tvm.runtime import cuda, image, library, tensors
from dcnv3_tvm.runtime.metadata import (
    CARD,
    LIBRARY,
    METADATA,
    WEIGHTS,
    ArtifactMetadata,
)
from dcnv3_tvm.signature import Entry


class CompiledModel:
    """A compiled model in memory; made by `dcnv3_tvm.load` and `dcnv3_tvm.compile_model`.

    Calls from several threads are taken one after the other. What a call returns stays valid
    after the model is closed.

    Examples
    --------
    >>> model = dcnv3_tvm.load("internimage_t")  # doctest: +SKIP
    >>> logits = model(model.preprocess("photo.jpg"))  # doctest: +SKIP
    >>> c2, c3, c4, c5 = model.features(model.preprocess("photo.jpg"))  # doctest: +SKIP
    """

    def __init__(
        self,
        machine: Any,
        weights: dict[str, Any],
        metadata: ArtifactMetadata,
        *,
        folder: Path,
        threads: int,
        gpu: cuda.Gpu | None = None,
        owner: object | None = None,
    ) -> None:
        self.metadata = metadata
        """What the artifact says about itself."""
        self.threads = threads
        """Threads of the processor a call computes with."""
        self.device = "cpu" if gpu is None else gpu.name
        """Where it runs: ``"cpu"``, ``"cuda:0"``."""
        self._gpu = gpu
        self._buffers: list[Any] = []
        self._weight_bytes = tensors.total_bytes(weights.values())
        self._folder = folder
        self._owner = owner
        self._lock = threading.Lock()
        self._functions: dict[str, tuple[Any, list[Any]]] = {}
        for name, entry in metadata.entries.items():
            try:
                function = machine[name]
            except AttributeError as error:
                raise ArtifactError(
                    f"{LIBRARY} has no function {name!r}", hint="Compile the model again."
                ) from error
            self._functions[name] = (function, [weights[weight] for weight in entry.weights])

    def __call__(self, *inputs: Any) -> Any:
        """Run the model.

        Parameters
        ----------
        *inputs : numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
            As ``metadata.entries["main"].inputs`` says, an NCHW image as a rule. Used in place
            where contiguous and aligned to 64 bytes (as `preprocess` and PyTorch give it), copied
            otherwise. A model on a GPU takes tensors that are there, computes on the stream that is
            current where it is called, and returns before it is done, as PyTorch does; arrays of
            NumPy are copied there, and the result back.

        Returns
        -------
        array or dict of str to array
            Of the kind of the first input; a dict by name where there are several.

        Raises
        ------
        InvalidArgumentError
            If an input has another rank, shape, layout or element type, or is not where the model
            is.
        DeviceError
            If the GPU has too little free memory, or fails.
        """
        outputs = self._run("main", inputs)
        if len(outputs) == 1:
            return outputs[0]
        return dict(zip(self.output_names(), outputs, strict=True))

    def features(self, *inputs: Any) -> list[Any]:
        """Return the feature pyramid: NCHW maps, finest first.

        Parameters
        ----------
        *inputs : numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
            As in a call.

        Raises
        ------
        InvalidArgumentError, DeviceError
            As in a call, and if the model was compiled without feature maps.
        """
        name = self.metadata.feature_entry
        if name is None:
            raise InvalidArgumentError(
                "this artifact returns no feature maps",
                got=f"outputs {', '.join(self.output_names())}",
                hint="Compile with --features-only, or import a create_model(..., "
                "features_only=True).",
            )
        return self._run(name, inputs)

    def output_names(self, entry: str = "main") -> list[str]:
        """Return the names of an entry's outputs."""
        return [output.name for output in self._entry(entry).outputs]

    def preprocess(self, source: image.Source | Sequence[image.Source]) -> np.ndarray:
        """Turn an image, or several, into the input: a normalised NCHW batch.

        Parameters
        ----------
        source : path, PIL.Image.Image or uint8 array of shape (H, W, 3), or a sequence of these
            Of any size.

        Raises
        ------
        ImageError
            If something is not an image.
        InvalidArgumentError
            If the artifact does not say how to preprocess.
        """
        info = self._entry("main").inputs[0]
        return image.preprocess(source, self.metadata.preprocessing, dtype=info.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the artifact to a folder, whole or not at all.

        An artifact at `path` is replaced, and stays whole when anything fails.

        Raises
        ------
        ArtifactError
            If `path` holds something else, cannot be written, or the copy differs.
        """
        destination = Path(path)
        refuse_foreign(destination)
        try:
            with files.atomic_folder(destination) as temporary:
                for name in (LIBRARY, WEIGHTS, *self.metadata.libraries, CARD, METADATA):
                    shutil.copyfile(self._folder / name, temporary / name)
                    expected = self.metadata.digests.get(name)
                    if expected is not None and files.sha256(temporary / name) != expected:
                        raise ArtifactError(
                            f"{name} was changed after the model was loaded", got=self._folder
                        )
        except OSError as error:
            raise ArtifactError(
                "the artifact cannot be saved",
                got=f"{error.strerror or error} ({error.filename or destination})",
                hint=f"What was at {destination} is unchanged.",
            ) from error

    def close(self) -> None:
        """Let go of code, weights and temporary files; later calls are refused.

        On a GPU, the memory goes back as well, but for that of results that are still in use.
        """
        with self._lock:
            self._functions.clear()
            self._buffers.clear()
            self._owner = None
            if self._gpu is not None:
                self._gpu.release_unused()

    def __enter__(self) -> CompiledModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        signature = ", ".join(tensors.describe(info) for info in self._entry("main").inputs)
        return f"<CompiledModel {self.metadata.name} for {self.metadata.target.slug}: {signature}>"

    def _entry(self, name: str) -> Entry:
        try:
            return self.metadata.entries[name]
        except KeyError:
            raise InvalidArgumentError(
                "the model has no such entry",
                got=repr(name),
                allowed=", ".join(self.metadata.entries),
            ) from None

    def _run(self, name: str, inputs: Sequence[Any]) -> list[Any]:
        arguments = tensors.Arguments(inputs, self._entry(name).inputs, self._gpu)
        with self._lock, self._place(arguments):
            if name not in self._functions:
                raise InvalidArgumentError("the model is closed", hint="Load it again.")
            function, weights = self._functions[name]
            library.use_threads(self.threads)
            taken = arguments.tensors(self._buffers)
            try:
                result = function(*taken, *weights)
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise self._failure(error, name) from error
        return [arguments.give(tensor) for tensor in flatten(result)]

    def _place(self, arguments: tensors.Arguments) -> contextlib.AbstractContextManager[None]:
        """Make the caller's stream the one that kernels of this thread run on."""
        if self._gpu is None:
            return contextlib.nullcontext()
        return self._gpu.turn_on_stream(arguments.stream)

    def _failure(self, error: Exception, name: str) -> DCNv3Error:
        if self._gpu is not None:
            activations = self.metadata.activation_bytes.get(name)
            needed = cuda.needed_memory(self._weight_bytes, activations)
            told = self._gpu.error(error, needed=needed)
            if told is not None:
                return told
        return InvalidArgumentError("the compiled model refuses the input", got=first_line(error))


def flatten(result: Any) -> list[Any]:
    """Return the tensors of a result, which may be a nest of TVM arrays, in order."""
    if hasattr(result, "__dlpack__"):
        return [result]
    return [tensor for item in result for tensor in flatten(item)]


def refuse_foreign(destination: Path) -> None:
    """Refuse to replace what is neither an artifact nor an empty folder.

    Raises
    ------
    ArtifactError
        If something else is there.
    """
    if not destination.exists():
        return
    if destination.is_dir() and not destination.is_symlink():
        names = {entry.name for entry in destination.iterdir()}
        if not names or METADATA in names:
            return
    raise ArtifactError(
        "the destination exists and is no artifact, so it is not replaced",
        got=destination,
        hint="Choose another folder, or remove it first.",
    )
