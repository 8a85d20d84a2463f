"""The metadata of an artifact: its entries, target, kernels, versions and digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Final, TypedDict

from dcnv3_tvm.errors import ArtifactError, InvalidArgumentError
from dcnv3_tvm.json_values import decode
from dcnv3_tvm.machine import AMX_FEATURES
from dcnv3_tvm.preprocessing import size_settings
from dcnv3_tvm.signature import (
    MAIN,
    OFFSETS,
    Entry,
    TensorInfo,
    function_of,
    is_input_size,
    size_name,
    sized_entry,
)
from dcnv3_tvm.size_expressions import evaluate_size
from dcnv3_tvm.systems import SYSTEMS, System, system_of, this_system

SCHEMA_VERSION: Final = 3
"""Incremented when older readers can no longer load the folder."""

LIBRARY: Final = "model.so"
WEIGHTS: Final = "weights.safetensors"
METADATA: Final = "metadata.json"
CARD: Final = "README.md"
RUNTIME_LIBRARY: Final = this_system().runtime_library
"""TVM's runtime library on this system."""

CUDA_LIBRARY: Final = "libtvm_runtime_cuda.so"
"""Additional library in artifacts for GPUs."""

_LIBRARIES: Final = {CUDA_LIBRARY, *(system.runtime_library for system in SYSTEMS.values())}

FILES: Final = frozenset({LIBRARY, WEIGHTS, METADATA, CARD, *_LIBRARIES})
"""Names of all files that an artifact may have."""

AMX_RULE: Final = "tile_matmul"
"""The schedule rule whose kernels use AMX, where the target has it."""


@dataclasses.dataclass(frozen=True)
class TargetInfo:
    """The machine an artifact was compiled for.

    Parameters
    ----------
    kind : str
        TVM's target kind, ``"llvm"`` or ``"cuda"``.
    triple : str
        LLVM's target triple of the CPU, or of a GPU's host.
    mcpu : str
        LLVM's name of the CPU.
    features : tuple of str
        LLVM's names of the CPU features that the code may use.
    slug : str
        Short name, for example ``"cpu-znver4"``.
    text : str
        The target in TVM's syntax.
    arch : str
        GPU architecture, for example ``"sm_90"``; empty for a CPU.
    """

    kind: str
    triple: str = ""
    mcpu: str = ""
    features: tuple[str, ...] = ()
    slug: str = ""
    text: str = ""
    arch: str = ""

    @property
    def architecture(self) -> str:
        """The CPU architecture, for example ``"x86_64"``; empty if unknown."""
        return self.triple.partition("-")[0]

    @property
    def system(self) -> System | None:
        """The system that runs the code; None if unknown."""
        return system_of(self.triple)

    @property
    def is_for_another_system(self) -> bool:
        """Whether the code is for another operating system or CPU architecture than this one."""
        return bool(self.triple) and not this_system().runs(self.triple)


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """Operations of a kernel.

    Parameters
    ----------
    flops_per_output : float
        Multiplications and additions for an element of the result; 0 if memory bounds the kernel.
    matmul : bool
        Whether they run at the matmul rate of the second argument's element type, else in float32.
    """

    flops_per_output: float
    matmul: bool


@dataclasses.dataclass(frozen=True)
class ArtifactMetadata:
    """Metadata of an artifact.

    Parameters
    ----------
    name : str
        Name of the model, for example ``"internimage_t"``.
    entries : dict of str to Entry
        Callable functions; ``"main"`` always exists. In a model of several image sizes, those for
        further sizes have names such as ``"main_384x640"``.
    target : TargetInfo
        Machine it was compiled for.
    dtype : str
        Element type of the matmul operands.
    config : dict
        Variant and configuration of the model, JSON values.
    preprocessing : dict
        Settings of `preprocess`, JSON values; empty if unknown.
    sizes : dict of str to dict
        For each further image size, such as ``"384x640"``, its settings of `preprocess`.
    labels : tuple of str
        Names of the classes in order; empty if unknown.
    versions : dict of str to str
        Versions of ``dcnv3_tvm``, ``tvm`` and ``tvm_ffi`` it was compiled with.
    kernels : dict of str to str
        Schedule rule that was applied to each kernel.
    work : dict of str to KernelWork
        Operations of each kernel; empty in artifacts of earlier versions.
    activation_bytes : dict of str to int
        Memory for intermediate results of a call, by entry; entries with dynamic shapes are left
        out.
    records : dict of str to str
        For each kernel ``"hit"`` if a tuning record determined its schedule, ``"miss"`` if there is
        none, or why its record was rejected; empty if compiled without records.
    records_from : dict
        Origin of these records, JSON values.
    verification : dict or None
        Result of `dcnv3-tvm verify --record`.
    created : str
        Date and time of compilation, ISO 8601.
    digests : dict of str to str
        Digests of the libraries and the weights, filled in when it is written.
    """

    name: str
    entries: dict[str, Entry]
    target: TargetInfo
    dtype: str = "float32"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    kernels: dict[str, str] = dataclasses.field(default_factory=dict)
    work: dict[str, KernelWork] = dataclasses.field(default_factory=dict)
    activation_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    records: dict[str, str] = dataclasses.field(default_factory=dict)
    records_from: dict[str, Any] = dataclasses.field(default_factory=dict)
    verification: dict[str, Any] | None = None
    created: str = ""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def libraries(self) -> tuple[str, ...]:
        """Names of TVM's runtime libraries in the folder; none if they were left out."""
        return tuple(name for name in self.digests if name in _LIBRARIES)

    @property
    def uses_amx(self) -> bool:
        """Whether kernels use matrix tiles, which a process needs a permission for."""
        return set(self.target.features) >= AMX_FEATURES and AMX_RULE in self.kernels.values()

    @property
    def feature_entry(self) -> str | None:
        """Name of the entry that returns feature maps; None without one."""
        for name in ("features", "main"):
            entry = self.entries.get(name)
            if entry and all(output.stride is not None for output in entry.outputs):
                return name
        return None

    def entries_of(self, function: str) -> dict[str, Entry]:
        """Return the entries that are a function: one for each image size, in order."""
        return {
            name: entry for name, entry in self.entries.items() if function_of(name) == function
        }

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Heights and widths that the model takes, the default first; empty if they are dynamic."""
        sizes = (entry.inputs[0].image_size for entry in self.entries_of(MAIN).values())
        return [size for size in sizes if size is not None]

    def entry_for(self, function: str, size: tuple[int, int] | None) -> Entry:
        """Return the entry that is a function for images of one of `image_sizes`."""
        if size is None or size_name(size) not in self.sizes:
            return self.entries[function]
        return self.entries[sized_entry(function, size_name(size))]

    def preprocessing_for(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """Return the settings of `preprocess` for an image size; by default the first.

        Raises
        ------
        InvalidArgumentError
            If the model does not take images of that size.
        """
        if size is None:
            return self.preprocessing
        if not self.image_sizes:
            return self.preprocessing and self.preprocessing | size_settings(size)
        if size not in self.image_sizes:
            raise wrong_size(size, self.image_sizes)
        return self.sizes.get(size_name(size), self.preprocessing)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and stride of each feature map; empty without feature maps."""
        if self.feature_entry is None:
            return []
        return [
            {"name": output.name, "channels": _channels(output), "stride": output.stride}
            for output in self.entries[self.feature_entry].outputs
        ]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, with a digest of themselves."""
        target = dataclasses.asdict(self.target) | {"features": list(self.target.features)}
        target["str"] = target.pop("text")
        data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "dtype": self.dtype,
            "config": self.config,
            "preprocessing": self.preprocessing,
            "sizes": self.sizes,
            "labels": list(self.labels),
            "target": target,
            "versions": self.versions,
            "entries": {name: entry.to_json() for name, entry in self.entries.items()},
            "feature_info": self.feature_info,
            "kernels": self.kernels,
            "work": {name: dataclasses.asdict(work) for name, work in self.work.items()},
            "activation_bytes": self.activation_bytes,
            "records": self.records,
            "records_from": self.records_from,
            "verification": self.verification,
            "created": self.created,
            "digests": self.digests,
        }
        return data | {"digest": _digest(data)}

    def dumps(self) -> str:
        """Return the content of ``metadata.json``."""
        return json.dumps(self.to_json(), indent=2) + "\n"

    @classmethod
    def loads(cls, text: str, *, verify_digest: bool = True) -> ArtifactMetadata:
        """Parse the content of ``metadata.json``.

        Parameters
        ----------
        text : str
            What `dumps` returned.
        verify_digest : bool
            Check that it was not modified.

        Raises
        ------
        ArtifactError
            If it is not JSON, of another schema version, modified, or incomplete.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{METADATA} is not valid JSON", got=error, hint="Compile the model again."
            ) from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{METADATA} has another schema version",
                got=version if isinstance(version, int | str) else type(version).__name__,
                allowed=SCHEMA_VERSION,
                hint="Compile the model again with the installed dcnv3_tvm.",
            )
        digest = data.pop("digest", None)
        try:
            if verify_digest and digest != _digest(data):
                raise ArtifactError(
                    f"{METADATA} was modified after it was written",
                    hint="Compile the model again, or load with verify_digests=False.",
                )
            return cls._from_json(data)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{METADATA} is invalid", got=error, hint="Compile the model again."
            ) from error

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> ArtifactMetadata:
        target = decode(dict[str, Any], data.get("target"), "target")
        if "str" in target:
            target = target | {"text": target["str"]}
        metadata: ArtifactMetadata = decode(cls, data | {"target": target}, "metadata")
        if metadata.verification is not None:
            verification = decode(_Verification, metadata.verification, "verification")
            if not verification["outputs"]:
                raise ValueError("verification has no outputs")
        if metadata.records or metadata.records_from:
            decode(_RecordsOrigin, metadata.records_from, "records_from")
        if MAIN not in metadata.entries:
            raise ValueError("entries has no main")
        for size in metadata.sizes:
            if sized_entry(MAIN, size) not in metadata.entries:
                raise ValueError(f"size {size!r} has no entry main")
        for name, entry in metadata.entries.items():
            if not entry.inputs or not entry.outputs:
                raise ValueError(f"entry {name!r} has no inputs, or no outputs")
            if function_of(name) == OFFSETS and len(entry.outputs) != 2 * len(entry.blocks):
                raise ValueError(f"entry {name!r} has not two outputs for each of its blocks")
            sizes = [size for tensor in entry.inputs for size in tensor.shape]
            wrong = [size for size in sizes if isinstance(size, str) and not is_input_size(size)]
            if wrong:
                raise ValueError(f"an input of entry {name!r} has the size {wrong[0]!r}")
            _check_blocks(entry, name)
            for tensor in (*entry.inputs, *entry.outputs):
                _check_tensor(tensor, f"{tensor.name!r} of entry {name!r}")
        return metadata


class _VerifiedOutput(TypedDict):
    max_error: float


class _Verification(TypedDict):
    ok: bool
    reference: str
    outputs: list[_VerifiedOutput]


class _RecordsOrigin(TypedDict):
    target: str
    hardware: str
    date: str


def wrong_size(given: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> InvalidArgumentError:
    """Return the error for an image of another size than those the model takes."""
    nearest = min(
        sizes, key=lambda size: sum(abs(math.log(a / b)) for a, b in zip(size, given, strict=True))
    )
    return InvalidArgumentError(
        "the model does not take images of this size",
        got=size_name(given),
        allowed=", ".join(map(size_name, sizes)),
        hint=f"Resize or pad the image to {size_name(nearest)}, which is the nearest, or compile "
        f"the model for {size_name(given)} as well.",
    )


def _check_blocks(entry: Entry, name: str) -> None:
    values: dict[str, int] = {}
    for tensor in entry.inputs:
        values |= dict.fromkeys(tensor.dynamic_sizes([1] * len(tensor.shape)), 1)
    for block in entry.blocks:
        if len(block.size) != 2:
            raise ValueError(f"a block of entry {name!r} has not two sizes")
        for size in block.size:
            evaluate_size(size, values)


def _check_tensor(tensor: TensorInfo, name: str) -> None:
    if any(isinstance(size, int) and size < 1 for size in tensor.shape):
        raise ValueError(f"{name} has the shape {list(tensor.shape)}")
    if tensor.layout and len(tensor.layout) != len(tensor.shape):
        raise ValueError(f"{name} has the layout {tensor.layout!r} and {len(tensor.shape)} axes")


def _channels(tensor: TensorInfo) -> int | str | None:
    axis = tensor.layout.find("C")
    return tensor.shape[axis] if axis >= 0 else None


def _digest(data: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(data))  # String keys and lists, as a reader gets them.
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
