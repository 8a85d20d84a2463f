"""Compile the DCNv3 operator for one problem."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dcnv3_tvm import checks, files, gpu, machine, targets
from dcnv3_tvm.compiler.argument_checks import check_shapes, check_tensors
from dcnv3_tvm.errors import (
    CompileError,
    InvalidArgumentError,
    TargetError,
    raise_if_tvm_is_missing,
)
from dcnv3_tvm.forks import fork_safe_lock
from dcnv3_tvm.runtime import library, tensors
from dcnv3_tvm.runtime.call_threads import Contexts
from dcnv3_tvm.runtime.cuda import Gpu, load_runtime
from dcnv3_tvm.spec import DCNv3Spec

if TYPE_CHECKING:
    from tvm.target import Target

TensorT = TypeVar("TensorT")

CACHE_SIZE: Final = 256
"""Number of compiled operators in the cache, which evicts the least recently used."""

_COMPILING = fork_safe_lock()

_NAME: Final = "dcnv3"


@dataclasses.dataclass(frozen=True)
class CompiledOperator:
    """A compiled DCNv3 operator: call it with ``(x, offset, mask)``.

    Parameters
    ----------
    spec : DCNv3Spec
        What was compiled; sizes that are ``None`` may differ from call to call.
    target : tvm.target.Target
        Target of the kernel.
    rule : str
        Name of the schedule rule that was used.
    record : str
        ``"hit"`` where a tuning record chose the schedule; ``"miss"``, or the reason why a record
        was rejected; empty where no records were used.
    executable : tvm.runtime.Executable or DeviceLibrary
        The compiled module, with one function, ``dcnv3(x, offset, mask, out)``.
    database : str
        As passed to `compile_op`, which compiles again what was pickled or copied.
    """

    spec: DCNv3Spec
    target: Target
    rule: str
    record: str
    executable: Any
    database: str = "none"

    def __reduce__(self) -> tuple[Any, ...]:
        return _compile, (self.spec, str(self.target), self.database)

    def __call__(self, x: TensorT, offset: TensorT, mask: TensorT) -> TensorT:
        """Run the operator.

        Parameters
        ----------
        x, offset, mask : numpy.ndarray, torch.Tensor or tvm.runtime.Tensor
            As for `dcnv3_tvm.dcnv3`, with the shapes of `spec`, on the target's device.

        Returns
        -------
        Same kind as `x`
            Shape (N, Ho, Wo, C).

        Raises
        ------
        InvalidArgumentError
            If a tensor does not match `spec`, or is on another device.
        TargetError
            If the operator was compiled for another machine.
        DeviceError
            If the GPU has too little free memory, or fails.
        """
        self._check_device(check_tensors(x, offset, mask))
        shape = tensors.shape_of(x)
        matches = len(shape) == 4 and all(
            size == wanted or (wanted is None and (size > 0 or axis == 0))
            for axis, (size, wanted) in enumerate(zip(shape, self.spec.input_shape, strict=True))
        )
        if not matches:
            raise InvalidArgumentError(
                "x has the wrong shape",
                got=f"shape {shape}",
                allowed=f"shape {self.spec.input_shape} (None: any size), NHWC",
            )
        spec = self.spec
        if not spec.is_static:
            spec = dataclasses.replace(spec, batch=shape[0], height=shape[1], width=shape[2])
        check_shapes(spec, x, offset, mask)
        return self.run_checked(spec, x, offset, mask)

    def run_checked(self, spec: DCNv3Spec, x: TensorT, offset: TensorT, mask: TensorT) -> TensorT:
        """Run the operator on tensors already checked against the static specification `spec`."""
        out = tensors.empty_like(x, [int(size or 0) for size in spec.output_shape])
        if spec.batch == 0:
            return out
        device = tensors.device_of(x)
        if device == tensors.CPU:
            function = self._function
            arguments = [tensors.to_kernel(each) for each in (x, offset, mask, out)]
            _cpu_calls().run(lambda _: function(*arguments), _threads())
        else:
            self._run_on_gpu(device, (x, offset, mask, out))
        return out

    def _run_on_gpu(self, device: str, arguments: Sequence[Any]) -> None:
        present = Gpu.of(_gpu_index(device, str(self.target.attrs["arch"])))
        function = self._function
        with present.on_stream(present.stream_of(arguments[0])), present.translate_errors():
            function(*(tensors.to_kernel(each, gpu.VECTOR_BYTES) for each in arguments))

    def _check_device(self, device: str) -> None:
        on_gpu = targets.is_gpu(self.target)
        if (device != tensors.CPU) != on_gpu:
            raise InvalidArgumentError(
                "the tensors are not on the operator's device",
                got=device,
                allowed="an NVIDIA GPU" if on_gpu else tensors.CPU,
                hint='Use x.to("cuda"), for PyTorch\'s tensors, or compile_op(spec, "auto").'
                if on_gpu
                else 'Use x.cpu(), or compile_op(spec, "cuda").',
            )

    @functools.cached_property
    def _function(self) -> Any:
        """The kernel; raises `TargetError` where this machine cannot run it."""
        if targets.is_gpu(self.target):
            return self.executable[_NAME]
        architecture = str(self.target.attrs.get("mtriple", "")).partition("-")[0]
        if architecture not in ("", machine.architecture()):
            missing = [architecture]
        else:
            missing = machine.missing_features(targets.target_features(self.target))
        if missing:
            raise TargetError(
                "the operator was compiled for another machine",
                got=f"{targets.target_slug(self.target)}, which needs {', '.join(missing)}",
                hint='Compile with target="auto".',
            )
        return self.executable[_NAME]


@dataclasses.dataclass(frozen=True)
class DeviceLibrary:
    """GPU code that is loaded on first use, so that it compiles on machines without a GPU.

    Parameters
    ----------
    code : bytes
        A shared library.
    """

    code: bytes

    def __getitem__(self, name: str) -> Any:
        return self._module[name]

    @functools.cached_property
    def _module(self) -> Any:
        load_runtime()
        return library.open_library(self.code)


@functools.cache
def _gpu_index(device: str, arch: str) -> int:
    """Return the index of a GPU such as ``"cuda:0"``, which must run code for `arch`."""
    index = int(device.partition(":")[2])
    present = gpu.device(index)
    if not gpu.runs_on(arch, present.arch):
        raise TargetError(
            "the operator was compiled for another GPU architecture",
            got=f"{arch}, where {device} ({present.name}) has {present.arch}",
            hint=f'Compile with target="{gpu.target_name(present.arch)}".',
        )
    return index


@functools.cache
def _threads() -> int:
    return library.default_threads()


@functools.cache
def _cpu_calls() -> Contexts[None]:
    """As many calls side by side as there are cores for their threads."""
    return Contexts([None] * max(1, len(machine.usable_cores()) // _threads()))


def compile_op(
    spec: DCNv3Spec,
    target: str | Mapping[str, Any] | Target = "auto",
    *,
    database: str | os.PathLike[str] = "default",
) -> CompiledOperator:
    """Compile the operator for one problem.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem. Sizes that are ``None`` are dynamic: one operator handles all of them. An empty
        batch is dynamic, too.
    target : str, mapping or tvm.target.Target
        As for `dcnv3_tvm.targets.resolve_target`.
    database : str or path
        Tuning records: ``"default"``, this package's own; ``"none"``; or a folder that
        `dcnv3-tvm tune` wrote.

    Returns
    -------
    CompiledOperator
        From a cache of the `CACHE_SIZE` most recently used, if it was compiled before.

    Raises
    ------
    InvalidArgumentError
        If `spec` is not a specification.
    TargetError
        If the target is unknown.
    RecordsError
        If the folder `database` holds no records, or records for another target or TVM version.
    CompileError
        If TVM fails to compile it.
    MissingDependencyError
        If TVM's compiler is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from dcnv3_tvm import DCNv3Spec
    >>> operator = compile_op(DCNv3Spec.of((None, None, None, 8), group=2))
    >>> x, offset = np.ones((1, 6, 7, 8), "float32"), np.zeros((1, 6, 7, 36), "float32")
    >>> operator(x, offset, np.ones((1, 6, 7, 18), "float32")).shape
    (1, 6, 7, 8)
    """
    if not isinstance(spec, DCNv3Spec):
        raise InvalidArgumentError(
            "spec is not a DCNv3Spec",
            got=repr(spec),
            hint="For example compile_op(DCNv3Spec.of((1, 56, 56, 64), group=4)).",
        )
    if spec.batch == 0:
        spec = dataclasses.replace(spec, batch=None)
    try:
        # Targets compare by identity, so the cache is keyed by their text.
        text = _text_of(target) if isinstance(target, str) else str(targets.resolve_target(target))
        return _compile(spec, text, str(checks.path("database", database)))
    except ModuleNotFoundError as error:
        raise_if_tvm_is_missing(error, "the operator")
        raise


@functools.lru_cache(maxsize=64)
def _text_of(target: str) -> str:
    return target if target == "auto" else str(targets.resolve_target(target))


@functools.lru_cache(maxsize=CACHE_SIZE)
def _compile(spec: DCNv3Spec, target_text: str, database: str) -> CompiledOperator:
    import tvm
    from tvm.target import Target

    from dcnv3_tvm import schedules
    from dcnv3_tvm.op.tensorir import dcnv3
    from dcnv3_tvm.schedules.records import find_records

    auto = target_text == "auto"
    target = targets.resolve_target("auto") if auto else Target(target_text)
    records = find_records(target, database)
    kernel = dcnv3(spec, vector_loads=targets.is_gpu(target))
    with _COMPILING:
        module, taken = schedules.schedule_module(
            tvm.IRModule({_NAME: kernel}), target, records=records
        )
        try:
            if targets.is_gpu(target):
                executable: Any = _compile_for_gpu(module[_NAME], target)
            else:
                executable = tvm.compile(module, target=target)
        except (RuntimeError, ValueError, TypeError) as error:
            raise CompileError(
                f"TVM cannot compile the operator ({error})",
                got=f"{spec.slug} for {targets.target_slug(target)}",
            ) from error
        found = taken[_NAME]
        return CompiledOperator(spec, target, found.rule, found.record, executable, database)


def _compile_for_gpu(function: Any, target: Target) -> DeviceLibrary:
    from dcnv3_tvm.compiler.kernel_library import export_kernel

    with files.temporary_folder("op-") as folder:
        path = Path(folder) / "op.so"
        export_kernel(function, target, path, name=_NAME)
        return DeviceLibrary(path.read_bytes())
