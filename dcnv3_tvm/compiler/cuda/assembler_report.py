"""What NVIDIA's assembler says of a scheduled kernel: no GPU is needed to ask it.

Needs nvcc, which is called as for an artifact. Instructions are counted in the machine code, of
which every one takes 16 bytes on the architectures of `dcnv3_tvm.gpu`; in a kernel without loops
that is what a thread executes at most.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import tempfile
from pathlib import Path
from typing import Final

import tvm
from tvm import tirx
from tvm.target import Target
from tvm.tirx import compilation_pipeline

from dcnv3_tvm import gpu
from dcnv3_tvm.compiler.cuda import cuda_module, device_pipeline
from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.runtime import toolkit
from dcnv3_tvm.targets import gpu_architecture

_INSTRUCTION_BYTES: Final = 16
_OPCODE_MASK: Final = 0xFFF
_NOP, _BRANCH_TO_ITSELF = 0x918, 0x947
_NAME: Final = "main"


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One kernel for one architecture.

    Parameters
    ----------
    registers : int
        32-bit registers of a thread.
    spill_bytes, stack_bytes : int
        Memory of a thread for values that have no register, and for arrays.
    shared_bytes : int
        Shared memory of a block.
    threads : int
        Threads of a block.
    instructions : int
        Machine instructions, without padding.
    load_bytes : tuple of int
        Widths of the loads from global memory, copies into shared memory included; rising.
    tensor_cores : bool
        Whether it multiplies on tensor cores.
    asynchronous : bool
        Whether it copies into shared memory without a detour through registers.
    occupancy : float
        Threads that a multiprocessor holds at once, as a fraction of the most it can.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    instructions: int
    load_bytes: tuple[int, ...]
    tensor_cores: bool
    asynchronous: bool
    occupancy: float


def report(func: tirx.PrimFunc, target: Target) -> list[KernelReport]:
    """Compile a scheduled function for a GPU and report each kernel in it.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Scheduled, intrinsics in place.
    target : tvm.target.Target
        A GPU.

    Raises
    ------
    CompileError
        If nvcc is not there, or refuses the source.
    """
    nvcc = toolkit.find_nvcc()
    if nvcc is None:
        raise CompileError(
            "a report needs nvcc, which is not installed",
            hint="Install the CUDA 13 toolkit: its bin/nvcc on the PATH, or CUDA_HOME set.",
        )
    arch = str(target.attrs["arch"])
    module = tvm.IRModule({_NAME: func.with_attr("global_symbol", _NAME)})
    with device_pipeline.lowering():
        shared = _shared_bytes(module, target)
        executable = tvm.compile(module, target=target, tir_pipeline=device_pipeline.PIPELINE)
    source = "\n".join(cuda_module.cuda_sources(executable.mod))
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-") as folder:
        ptx, log, cubin = _assemble(nvcc, source, arch, Path(folder))
    sizes = _instructions(cubin)
    reports = []
    for name, text in _functions(ptx).items():
        said = log[name]
        found = re.search(r"\.maxntid (\d+)", text)
        threads = int(found[1]) if found else gpu.WARP
        reports.append(_report(text, said, threads, sizes[name], shared.get(name, 0), target))
    return reports


def _report(
    ptx: str, said: str, threads: int, instructions: int, dynamic: int, target: Target
) -> KernelReport:
    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    registers, static = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem")
    return KernelReport(
        registers=registers,
        spill_bytes=number(r"(\d+) bytes spill stores"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=static + dynamic,
        threads=threads,
        instructions=instructions,
        load_bytes=_load_bytes(ptx),
        tensor_cores="mma.sync" in ptx,
        asynchronous="cp.async" in ptx,
        occupancy=_occupancy(threads, registers, static + dynamic, gpu_architecture(target)),
    )


def _occupancy(threads: int, registers: int, shared: int, arch: gpu.Architecture) -> float:
    warps = -(-threads // gpu.WARP)
    # Registers are given to warps in units of 256.
    warp_registers = -(-registers * gpu.WARP // 256) * 256
    blocks = min(
        arch.blocks,
        arch.threads // (warps * gpu.WARP),
        gpu.REGISTERS // (warp_registers * warps),
        arch.shared_bytes // (shared + gpu.RESERVED_SHARED),
    )
    return blocks * warps * gpu.WARP / arch.threads


def _load_bytes(ptx: str) -> tuple[int, ...]:
    widths = {
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r"ld\.global(?:\.nc)?(?:\.v(\d))?\.[bufs](\d+)", ptx)
    }
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (\d+);", ptx)
    return tuple(sorted(widths | {int(width) for width in copies}))


def _shared_bytes(module: tvm.IRModule, target: Target) -> dict[str, int]:
    """Dynamic shared memory of the kernels, as TVM's passes lay it out."""
    pipeline, *_ = compilation_pipeline.get_tir_pipeline("s_tir")
    lowered = pipeline(tirx.transform.BindTarget(target)(module))
    return {
        var.name_hint: sum(
            int(size)
            for size in re.findall(r'\((\d+),\), "uint8", scope="shared.dyn"', function.script())
        )
        for var, function in lowered.functions_items()
    }


def _assemble(
    nvcc: Path, source: str, arch: str, folder: Path
) -> tuple[str, dict[str, str], bytes]:
    """Return PTX code, what ptxas said of each kernel, and machine code."""
    more = ("--ptxas-options=-v", "--keep", f"--keep-dir={folder}")
    log = cuda_module.run_nvcc(nvcc, source, arch, folder, more)
    said = re.split(r"Compiling entry function '(\w+)'", log)
    texts = dict(zip(said[1::2], said[2::2], strict=True))
    return (folder / "kernels.ptx").read_text(), texts, (folder / "kernels.cubin").read_bytes()


def _functions(ptx: str) -> dict[str, str]:
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _instructions(cubin: bytes) -> dict[str, int]:
    """Count the instructions of every function in an ELF file of machine code."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry_size) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, _, _, _, offset, size in headers:
        end = cubin.index(b"\0", strings + name)
        label = cubin[strings + name : end].decode()
        if label.startswith(".text."):
            code = cubin[offset : offset + size]
            opcodes = [
                int.from_bytes(code[at : at + 2], "little") & _OPCODE_MASK
                for at in range(0, size, _INSTRUCTION_BYTES)
            ]
            while opcodes and opcodes[-1] in (_NOP, _BRANCH_TO_ITSELF):
                opcodes.pop()
            found[label.removeprefix(".text.")] = len(opcodes)
    return found
