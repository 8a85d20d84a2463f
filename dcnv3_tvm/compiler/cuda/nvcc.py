"""Compile CUDA source to a cubin with nvcc, or with NVRTC where nvcc is not installed."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dcnv3_tvm import files
from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.runtime import cuda_toolkit

# Fast division, square roots and exp2; and the operators of the half types, which generated code
# uses. Not --use_fast_math: its powf is NaN for negative bases, its tanhf and sinf are inaccurate.
_OPTIONS: Final = (
    "--ftz=true",
    "--prec-div=false",
    "--prec-sqrt=false",
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


def compile_cubin(source: str, arch: str) -> bytes:
    """Compile CUDA source to a cubin.

    Parameters
    ----------
    source : str
        CUDA C++.
    arch : str
        GPU architecture, for example ``"sm_90"``.

    Raises
    ------
    CompileError
        If no CUDA compiler is installed, or it reports an error.
    """
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is not None:
        with files.temporary_folder("cuda-") as folder:
            run_nvcc(nvcc, source, arch, Path(folder))
            return (Path(folder) / "kernels.cubin").read_bytes()
    nvrtc, headers = cuda_toolkit.find_nvrtc(), cuda_toolkit.find_headers()
    if nvrtc is not None and headers is not None:
        return _run_nvrtc(nvrtc, headers, source, arch)
    missing = "nvcc, or NVRTC" if nvrtc is None else "nvcc, or the headers that NVRTC needs"
    raise CompileError(
        f"no CUDA compiler is installed: found neither {missing}",
        hint="Install the CUDA 13 toolkit (its bin/nvcc on the PATH, or CUDA_HOME set), or run: "
        "pip install 'nvidia-cuda-nvrtc>=13,<14' 'nvidia-cuda-runtime>=13,<14' "
        "'nvidia-cuda-cccl>=13,<14'",
    )


def run_nvcc(nvcc: Path, source: str, arch: str, folder: Path, options: Sequence[str] = ()) -> str:
    """Compile CUDA source to ``kernels.cubin`` in a folder, and return nvcc's log.

    Parameters
    ----------
    nvcc : Path
        The compiler.
    source : str
        CUDA C++.
    arch : str
        GPU architecture, for example ``"sm_90"``.
    folder : Path
        Where all files are written.
    options : sequence of str
        Further options, for reports; they must not change the code.

    Raises
    ------
    CompileError
        If nvcc reports an error.
    """
    code, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    code.write_text(source, encoding="utf-8")
    fixed = (*_OPTIONS, "--expt-relaxed-constexpr", "-std=c++17", "-O3")
    command = [str(nvcc), "--cubin", f"-arch={arch}", *fixed, *options, str(code), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _compiler_error("nvcc", done.stderr or done.stdout, arch)
    return done.stderr


def _run_nvrtc(library: Path, headers: list[Path], source: str, arch: str) -> bytes:
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC opens it by name, which fails outside the search path.
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        options = [f"--gpu-architecture={arch}", "-default-device", "-std=c++17", *_OPTIONS]
        options += [f"-I{folder}" for folder in headers]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
        if failed:
            log = _nvrtc_bytes(nvrtc, "ProgramLog", program)
            raise _compiler_error("NVRTC", log.decode(errors="replace").rstrip("\0"), arch)
        return _nvrtc_bytes(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_bytes(nvrtc: ctypes.CDLL, kind: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
    return buffer.raw


def _compiler_error(compiler: str, log: str, arch: str) -> CompileError:
    errors = [line for line in log.splitlines() if "error" in line or "fatal" in line]
    return CompileError(
        f"{compiler} cannot compile the kernels",
        got=(errors or log.strip().splitlines() or ["no message"])[0],
        hint=f"It must support {arch} (nvcc --list-gpu-arch); CUDA 13 supports every architecture "
        "that models are compiled for.",
    )
