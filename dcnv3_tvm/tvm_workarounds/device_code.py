"""Keep CUDA source in a build, and replace it by cubins on export.

See tvm_workarounds: cuda-source.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

import tvm_ffi

from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.forks import RenewedLock

_FORCE_SOURCE: Final = "TVM_COMPILE_FORCE_FALLBACK"

_environment = RenewedLock()


@contextlib.contextmanager
def keep_cuda_source() -> Iterator[None]:
    """While entered, TVM leaves CUDA source uncompiled, also on a machine with a GPU."""
    with _environment.hold():
        before = os.environ.get(_FORCE_SOURCE)
        os.environ[_FORCE_SOURCE] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_FORCE_SOURCE]
            else:
                os.environ[_FORCE_SOURCE] = before


def pack_imports(root: Any, cubins: Mapping[str, bytes]) -> bytes:
    """Serialize the modules imported by a compiled module, with cubins in place of CUDA source.

    The format is what TVM's ``ProcessLibraryBin`` reads, each field preceded by its size: the
    import tree as two arrays, then for each module its kind and, unless it is the library itself,
    its bytes. The bytes of a CUDA module are the format of its code, a table of its functions, and
    the code.

    Parameters
    ----------
    root : tvm.runtime.Module
        Built under `keep_cuda_source`.
    cubins : mapping of str to bytes
        By CUDA source.

    Raises
    ------
    CompileError
        If a CUDA module does not hold one of the sources.
    """
    pack = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")
    reader = io.BytesIO(pack(root).numpy().tobytes())

    def take_field(element_bytes: int = 1) -> bytes:
        size = reader.read(8)
        return size + reader.read(element_bytes * int.from_bytes(size, "little"))

    reader.read(8)
    parts = [take_field(8), take_field(8)]
    modules = int.from_bytes(parts[0][:8], "little") - 1
    for _ in range(modules):
        kind = take_field()
        parts.append(kind)
        if kind == _field(b"_lib"):
            continue
        content = take_field()
        parts.append(_field(_with_cubin(content[8:], cubins)) if kind == _CUDA else content)
    return _field(b"".join(parts))


def _with_cubin(module: bytes, cubins: Mapping[str, bytes]) -> bytes:
    for source, cubin in cubins.items():
        code = _field(source.encode())
        if module.startswith(_CUDA) and module.endswith(code):
            table = module[len(_CUDA) : -len(code)]
            return _field(b"cubin") + table + _field(cubin)
    raise CompileError(
        "TVM's module holds no CUDA source", hint="Please report this as a bug of dcnv3_tvm."
    )


def _field(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


_CUDA: Final = _field(b"cuda")
"""The field for a CUDA module's kind, and for the format of its code while that is source."""
