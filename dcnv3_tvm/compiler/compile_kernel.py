"""Compile a kernel of the DCNv3 operator, or take it from the caches in memory and on disk.

TVM is imported only to compile: a kernel on disk needs its runtime library alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dcnv3_tvm
from dcnv3_tvm import files, machine, targets
from dcnv3_tvm.compiler import kernel_cache
from dcnv3_tvm.compiler.kernel_cache import CachedKernel
from dcnv3_tvm.compiler.linker import find_compiler, find_ld
from dcnv3_tvm.compiler.target_info import target_info
from dcnv3_tvm.errors import CompileError, MissingDependencyError
from dcnv3_tvm.forks import fork_safe_lock
from dcnv3_tvm.json_values import decode
from dcnv3_tvm.provenance import installed_version
from dcnv3_tvm.runtime import cuda_toolkit, library
from dcnv3_tvm.runtime.kernel import Kernel, KernelLibrary
from dcnv3_tvm.runtime.metadata import TargetInfo
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.systems import this_system

if TYPE_CHECKING:
    from tvm.target import Target

DCNV3: Final = "dcnv3"
"""The kind of kernel that computes the operator: ``dcnv3(x, offset, mask, out)``."""

GRAD_X: Final = "dcnv3_grad_x"
"""The kind that computes the gradient of x: ``dcnv3_grad_x(grad, offset, mask, grad_x)``, where
``grad_x`` has the accumulation type."""

GRAD_OFFSET_MASK: Final = "dcnv3_grad_offset_mask"
"""The kind that computes the gradients of offset and mask:
``dcnv3_grad_offset_mask(x, offset, mask, grad, grad_offset, grad_mask)``."""

CACHE_SIZE: Final = 256
"""Number of compiled kernels in memory, above which the least recently used are dropped."""

_SOURCES: Final = ("compiler", "kernels", "op", "transform", "tvm_workarounds", "schedules")
"""Folders of the code that determines the result, next to the package's own files."""

_SOURCE_SUFFIXES: Final = (".py", ".json", ".jsonl", ".c")

_RECORD_FILES: Final = ("about.json", "records.jsonl")
"""Files of tuning records, in the folder of a database or in its subfolder ``records``."""

_COMPILING = fork_safe_lock()


@functools.lru_cache(maxsize=CACHE_SIZE)
def compile_kernel(kind: str, spec: DCNv3Spec, target: str, database: str) -> Kernel:
    """Compile a kernel, unless it is in a cache.

    Parameters
    ----------
    kind : str
        Name of the function of `dcnv3_tvm.op.tensorir` that defines the kernel, such as `DCNV3`.
    spec : DCNv3Spec
        The problem; not with an empty batch.
    target : str
        From `dcnv3_tvm.targets.target_text`.
    database : str
        As for `dcnv3_tvm.compile_op`.

    Raises
    ------
    TargetError, RecordsError, CompileError, ModuleNotFoundError
        As for `dcnv3_tvm.compile_op`; the last if TVM's compiler is not installed.
    """
    with _COMPILING:
        key = _key(kind, spec, target, database)
        kernel = None if key is None else _from_cache(kind, key)
        return kernel or _compile(kind, spec, target, database, key)


def _from_cache(kind: str, key: str) -> Kernel | None:
    cached = kernel_cache.read(key)
    runtime = library.installed_runtime()
    if cached is None or runtime is None:
        return None
    path, version = runtime
    library.load_runtime(version=version, bundled=path)
    target: TargetInfo = decode(TargetInfo, cached.about["target"], "target")
    code = KernelLibrary(cached.code, on_gpu=bool(target.arch))
    return Kernel(kind, target, code, cached.about["rule"], cached.about["record"])


def _compile(kind: str, spec: DCNv3Spec, text: str, database: str, key: str | None) -> Kernel:
    import tvm

    from dcnv3_tvm import schedules
    from dcnv3_tvm.op import tensorir
    from dcnv3_tvm.schedules.records import find_records

    target = targets.target_from_text(text)
    on_gpu = targets.is_gpu(target)
    records = find_records(target, database)
    function = getattr(tensorir, kind)(spec, vector_loads=on_gpu)
    module, taken = schedules.schedule_module(
        tvm.IRModule({kind: function}), target, records=records
    )
    try:
        code = _build(module, target)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CompileError(
            f"TVM cannot compile the operator ({error})",
            got=f"{spec.slug} for {targets.target_slug(target)}",
        ) from error
    kernel = Kernel(kind, target_info(target), code, taken[kind].rule, taken[kind].record)
    if key is not None and isinstance(code, KernelLibrary):
        about = {
            "kernel": f"{kind} {spec.slug}",
            "target": dataclasses.asdict(kernel.target),
            "rule": kernel.rule,
            "record": kernel.record,
        }
        kernel_cache.write(key, CachedKernel(about, code.code))
    return kernel


def _build(module: Any, target: Target) -> Any:
    """Compile scheduled kernels to a library; without a linker, for a CPU, to code in memory."""
    import tvm

    from dcnv3_tvm.compiler import cpu_pipeline
    from dcnv3_tvm.compiler.cuda.export import export_module

    with files.temporary_folder("op-") as folder:
        path = Path(folder) / "op.so"
        if targets.is_gpu(target):
            export_module(module, target, path, linker=find_ld())
            return KernelLibrary(path.read_bytes(), on_gpu=True)
        executable = tvm.compile(module, target=target, tir_pipeline=cpu_pipeline.PIPELINE)
        linker = find_ld()
        if linker is None:
            return executable
        try:
            executable.mod.export_library(str(path), fcompile=linker)
        except RuntimeError:  # It is the linker of this system.
            return executable
        return KernelLibrary(path.read_bytes(), on_gpu=False)


def _key(kind: str, spec: DCNv3Spec, target: str, database: str) -> str | None:
    """Return the key of a kernel in the cache on disk; None if it cannot be kept there."""
    about_machine = _about_machine(target)
    if library.installed_runtime() is None or about_machine is None:
        return None
    parts = {
        "kind": kind,
        "spec": spec.to_json(),
        "target": target,
        "machine": about_machine,
        "versions": _versions(),
        "compiler": _compiler(),
        "sources": _sources_digest(),
        "records": _records_digest(database),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _about_machine(target: str) -> list[Any] | None:
    """Return what determines the code beyond the text of the target; None if unknown."""
    about: list[Any] = [machine.architecture(), len(machine.usable_cores())]
    if target == targets.AUTO:
        identity = machine.cpu_identity()
        return None if identity is None else [*about, identity]
    if json.loads(target)["kind"] == "cuda":
        compiler = cuda_toolkit.find_nvcc() or cuda_toolkit.find_nvrtc()
        if compiler is None or not compiler.is_file():
            return None
        status = compiler.stat()
        return [*about, str(compiler.resolve()), status.st_size, status.st_mtime_ns]
    return about


def _compiler() -> tuple[str, ...] | None:
    """Return the compiler of the thread pool that is linked to kernels."""
    try:
        return find_compiler(this_system())
    except MissingDependencyError:
        return None


def _versions() -> dict[str, str | None]:
    packages = ("apache-tvm", "apache-tvm-ffi")
    versions = {package: installed_version(package) for package in packages}
    return {**versions, "dcnv3-tvm": dcnv3_tvm.__version__}


@functools.cache
def _sources_digest() -> str:
    """Return a digest of the code that determines the result, with the shipped tuning records."""
    found = list(Path(dcnv3_tvm.__file__).parent.glob("*.py"))
    for name in _SOURCES:
        package = importlib.util.find_spec(f"dcnv3_tvm.{name}")
        for folder in (package and package.submodule_search_locations) or ():
            found += (p for p in Path(folder).rglob("*") if p.suffix in _SOURCE_SUFFIXES)
    return _digest(found)


def _records_digest(database: str) -> str:
    if database in ("default", "none"):
        return database
    folders = (Path(database), Path(database) / "records")
    return _digest(folder / name for folder in folders for name in _RECORD_FILES)


def _digest(paths: Iterable[Path]) -> str:
    """Return a digest of the names and contents of files, of which some may not be readable."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
