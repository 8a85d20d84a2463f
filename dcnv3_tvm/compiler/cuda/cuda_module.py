"""CUDA source to machine code, and machine code into a compiled library.

TVM compiles what it generates only where its runtime finds a GPU, and leaves source elsewhere. Here
it always leaves source, which is compiled to a cubin for the one architecture of the target: an
artifact made on a machine without a GPU is the same, nothing is compiled when it is loaded, and the
driver has nothing to do but to copy it.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import tvm
import tvm_ffi

from dcnv3_tvm.compiler.cuda import device_pipeline
from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.runtime import toolkit

LOWERING: Final = device_pipeline.PIPELINE
"""The pipeline from scheduled TensorIR to CUDA source."""

_FORCE_SOURCE: Final = "TVM_COMPILE_FORCE_FALLBACK"

# Division and exponentials by the units for special functions; operators of half types, which the
# generated code uses.
_OPTIONS: Final = (
    "--use_fast_math",
    *(
        f"-U__CUDA_NO_{kind}__"
        for kind in (
            "HALF_OPERATORS",
            "HALF_CONVERSIONS",
            "BFLOAT16_OPERATORS",
            "BFLOAT16_CONVERSIONS",
            "BFLOAT162_OPERATORS",
            "BFLOAT162_CONVERSIONS",
        )
    ),
)

_environment = threading.Lock()


@contextlib.contextmanager
def lowering(*, graph: bool = False) -> Iterator[None]:
    """Set what a build for GPUs needs: options of passes, and that source is left as it is.

    Parameters
    ----------
    graph : bool
        Let ``RewriteCUDAGraph`` find the parts of Relax functions that are captured into graphs.
    """
    with _environment, device_pipeline.lowering():
        options = dict(tvm.transform.PassContext.current().config)
        options["relax.backend.use_cuda_graph"] = graph
        before = os.environ.get(_FORCE_SOURCE)
        os.environ[_FORCE_SOURCE] = "1"
        try:
            with tvm.transform.PassContext(config=options):
                yield
        finally:
            if before is None:
                del os.environ[_FORCE_SOURCE]
            else:
                os.environ[_FORCE_SOURCE] = before


def build(module: tvm.IRModule, target: tvm.target.Target, path: Path) -> None:
    """Compile scheduled kernels, and Relax functions that call them, to a shared library.

    Parameters
    ----------
    module : tvm.IRModule
        Intrinsics in place.
    target : tvm.target.Target
        A GPU.
    path : Path
        The library.

    Raises
    ------
    CompileError
        As of `export`.
    RuntimeError
        If TVM cannot compile it.
    """
    with lowering():
        executable = tvm.compile(module, target=target, tir_pipeline=LOWERING)
    export(executable.mod, path, str(target.attrs["arch"]))


def export(module: Any, path: Path, arch: str) -> None:
    """Write a module built under `lowering` to a shared library that holds machine code.

    Parameters
    ----------
    module : tvm.runtime.Module
        The ``mod`` of an executable.
    path : Path
        The library.
    arch : str
        The GPU's architecture, for example ``"sm_90"``.

    Raises
    ------
    CompileError
        If there is no compiler for CUDA, or it fails.
    """

    def pack(root: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
        blob = _with_machine_code(root, arch)
        generate = tvm_ffi.get_global_func("codegen.codegen_blob")
        target = tvm.target.Target({"kind": "llvm"})
        file = os.path.join(folder, "devices.o")
        generate(blob, is_system_lib, str(target), prefix).write_to_file(file)
        return file

    module.export_library(str(path), fpack_imports=pack)


def machine_code(source: str, arch: str) -> bytes:
    """Compile CUDA source to a cubin, by nvcc or else by NVRTC.

    Parameters
    ----------
    source : str
        What TVM generated.
    arch : str
        For example ``"sm_90"``.

    Raises
    ------
    CompileError
        If neither compiler is installed, or it refuses the source.
    """
    nvcc = toolkit.find_nvcc()
    if nvcc is not None:
        with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-cuda-") as folder:
            run_nvcc(nvcc, source, arch, Path(folder))
            return (Path(folder) / "kernels.cubin").read_bytes()
    nvrtc, headers = toolkit.find_nvrtc(), toolkit.find_headers()
    if nvrtc is not None and headers is not None:
        return _by_nvrtc(nvrtc, headers, source, arch)
    missing = "nvcc, or NVRTC" if nvrtc is None else "nvcc, or the headers that NVRTC needs"
    raise CompileError(
        f"no compiler for CUDA is installed: neither {missing}",
        hint="Install the CUDA 13 toolkit (its bin/nvcc on the PATH, or CUDA_HOME set), or run: "
        "pip install 'nvidia-cuda-nvrtc>=13,<14' 'nvidia-cuda-runtime>=13,<14' "
        "'nvidia-cuda-cccl>=13,<14'",
    )


def run_nvcc(nvcc: Path, source: str, arch: str, folder: Path, more: Sequence[str] = ()) -> str:
    """Compile CUDA source to the file ``kernels.cubin`` in a folder.

    Parameters
    ----------
    nvcc : Path
        The compiler.
    source : str
        What TVM generated.
    arch : str
        For example ``"sm_90"``.
    folder : Path
        For all files.
    more : sequence of str
        Options that change nothing in the code.

    Returns
    -------
    str
        What the compiler said.

    Raises
    ------
    CompileError
        If it refuses the source.
    """
    code, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    code.write_text(source, encoding="utf-8")
    options = (*_OPTIONS, "--expt-relaxed-constexpr", "-std=c++17", "-O3")
    command = [str(nvcc), "--cubin", f"-arch={arch}", *options, *more, str(code), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _refused("nvcc", done.stderr or done.stdout, arch)
    return done.stderr


def _by_nvrtc(path: Path, headers: list[Path], source: str, arch: str) -> bytes:
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # it opens them by name, and may not find them
    nvrtc = ctypes.CDLL(str(path))
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        options = [f"--gpu-architecture={arch}", "-default-device", "-std=c++17", *_OPTIONS]
        options += [f"-I{folder}" for folder in headers]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
        if failed:
            log = _nvrtc_bytes(nvrtc, "ProgramLog", program)
            raise _refused("NVRTC", log.decode(errors="replace").rstrip("\0"), arch)
        return _nvrtc_bytes(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_bytes(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _refused(compiler: str, log: str, arch: str) -> CompileError:
    errors = [line for line in log.splitlines() if "error" in line or "fatal" in line]
    return CompileError(
        f"{compiler} cannot compile the kernels",
        got=(errors or log.strip().splitlines() or ["no message"])[0],
        hint=f"It must know {arch} (nvcc --list-gpu-arch): CUDA 13 knows all that are supported.",
    )


def _with_machine_code(root: Any, arch: str) -> bytes:
    """Return what TVM puts into the library beside its own code, with cubins instead of source.

    The layout is that of TVM's ``ProcessLibraryBin``: the size; the tree of imports, as two arrays;
    and for each module its kind and, unless it is the library itself, its bytes. Those of a module
    of CUDA are the format of its code, a table of its functions, and the code.
    """
    sources = [source.encode() for source in cuda_sources(root)]
    pack = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")
    reader = io.BytesIO(pack(root).numpy().tobytes())

    def take_field(count_of: int = 1) -> bytes:
        size = reader.read(8)
        return size + reader.read(count_of * int.from_bytes(size, "little"))

    reader.read(8)
    parts = [take_field(8), take_field(8)]
    modules = int.from_bytes(parts[0][:8], "little") - 1
    for _ in range(modules):
        kind = take_field()
        parts.append(kind)
        if kind == _field(b"_lib"):
            continue
        content = take_field()
        parts.append(_field(_compiled(content[8:], sources, arch)) if kind == _SOURCE else content)
    return _field(b"".join(parts))


def _compiled(module: bytes, sources: list[bytes], arch: str) -> bytes:
    """Return the bytes of a module of CUDA with machine code for its source."""
    for source in sources:
        code = _field(source)
        if module.startswith(_SOURCE) and module.endswith(code):
            table = module[len(_SOURCE) : -len(code)]
            return _field(b"cubin") + table + _field(machine_code(source.decode(), arch))
    raise CompileError(
        "TVM left no CUDA source to compile", hint="Report it: this is a mistake of the library."
    )


def cuda_sources(module: Any) -> list[str]:
    """Return the CUDA source in a compiled module and in those it imports."""
    own = [str(module.inspect_source("cuda"))] if module.kind == "cuda" else []
    return own + [source for part in module.imports for source in cuda_sources(part)]


def _field(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


_SOURCE: Final = _field(b"cuda")
"""How the fields read of a module's kind, and of the format of its code as long as it is source."""
