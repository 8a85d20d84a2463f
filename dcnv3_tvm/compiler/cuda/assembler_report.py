"""Registers, memory, instructions and occupancy of GPU kernels, from nvcc and ptxas.

Kernels are lowered and compiled as for an artifact; no GPU is needed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import instrument
from tvm.target import Target

from dcnv3_tvm import files, gpu
from dcnv3_tvm.compiler.cuda import device_pipeline
from dcnv3_tvm.compiler.cuda.nvcc import run_nvcc
from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.runtime import cuda_toolkit
from dcnv3_tvm.targets import gpu_architecture
from dcnv3_tvm.tvm_workarounds.device_passes import merge_conditionals

_INSTRUCTION_BYTES: Final = 16
"""Size of a machine instruction on all architectures of `dcnv3_tvm.gpu`."""

_OPCODE_MASK: Final = 0xFFF
_NOP, _BRANCH_TO_ITSELF = 0x918, 0x947


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """Resource usage of one kernel on one architecture.

    Parameters
    ----------
    registers : int
        32-bit registers per thread.
    spill_bytes, stack_bytes : int
        Local memory per thread for spilled registers, and for arrays.
    shared_bytes : int
        Shared memory per block, static and dynamic.
    threads : int
        Threads per block.
    instructions : int
        Machine instructions without padding. In a kernel without loops, this bounds what a thread
        executes.
    load_bytes : tuple of int
        Widths of the loads from global memory, including ``cp.async``, in ascending order.
    tensor_cores : bool
        Whether the kernel uses tensor cores.
    asynchronous : bool
        Whether the kernel copies to shared memory with ``cp.async``.
    occupancy : float
        Resident threads per SM as a fraction of the maximum.
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


def report(functions: Sequence[tirx.PrimFunc], target: Target) -> list[tuple[KernelReport, ...]]:
    """Compile scheduled functions for a GPU and report the kernels of each.

    They are compiled together, because most of nvcc's time does not depend on their number.

    Parameters
    ----------
    functions : sequence of tvm.tirx.PrimFunc
        Scheduled and tensorized.
    target : tvm.target.Target
        A GPU.

    Raises
    ------
    CompileError
        If nvcc is not installed, or reports an error.
    """
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        raise CompileError(
            "a kernel report needs nvcc, which is not installed",
            hint="Install the CUDA 13 toolkit: its bin/nvcc on the PATH, or CUDA_HOME set.",
        )
    arch = str(target.attrs["arch"])
    names = [f"f{index}" for index in range(len(functions))]
    module = tvm.IRModule(
        {
            name: func.with_attr("global_symbol", name)
            for name, func in zip(names, functions, strict=True)
        }
    )
    shared = _SharedMemory()
    with device_pipeline.lowering(instruments=[shared]):
        executable = tvm.compile(module, target=target, tir_pipeline=device_pipeline.PIPELINE)
    source = "\n".join(device_pipeline.cuda_sources(executable.mod))
    with files.temporary_folder("report-") as folder:
        ptx, logs, cubin = _assemble(nvcc, source, arch, Path(folder))
    sizes = _count_instructions(cubin)
    kernels = {
        name: _report(text, logs[name], sizes[name], shared.dynamic_bytes.get(name, 0), target)
        for name, text in _split_kernels(ptx).items()
    }
    return [
        tuple(found for kernel, found in kernels.items() if kernel.startswith(f"{name}_kernel"))
        for name in names
    ]


@instrument.pass_instrument
class _SharedMemory:
    """Record the dynamic shared memory of each kernel, which TVM passes at launch."""

    def __init__(self) -> None:
        self.dynamic_bytes: dict[str, int] = {}

    def run_after_pass(self, module: tvm.IRModule, info: tvm.transform.PassInfo) -> None:
        if info.name == merge_conditionals.info.name:  # which runs on device functions alone
            for var, kernel in module.functions_items():
                self.dynamic_bytes[var.name_hint] = _dynamic_shared_bytes(kernel)


def _report(
    ptx: str, log: str, instructions: int, dynamic_shared: int, target: Target
) -> KernelReport:
    def number(pattern: str, text: str = log, default: int = 0) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else default

    registers = number(r"Used (\d+) registers")
    shared = number(r"(\d+) bytes smem") + dynamic_shared
    threads = number(r"\.maxntid (\d+)", ptx, gpu.WARP_SIZE)
    return KernelReport(
        registers=registers,
        spill_bytes=number(r"(\d+) bytes spill stores"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=shared,
        threads=threads,
        instructions=instructions,
        load_bytes=_load_bytes(ptx),
        tensor_cores="mma.sync" in ptx,
        asynchronous="cp.async" in ptx,
        occupancy=_occupancy(threads, registers, shared, gpu_architecture(target)),
    )


def _dynamic_shared_bytes(kernel: tirx.PrimFunc) -> int:
    total = 0

    def add(allocation: tirx.AllocBuffer) -> None:
        nonlocal total
        buffer = allocation.buffer
        if buffer.scope() == "shared.dyn":
            elements = math.prod(int(size) for size in buffer.shape)
            total += elements * tvm.DataType(str(buffer.dtype)).itemsize

    tvm_ffi.structural_walk(kernel.body, (tirx.AllocBuffer, add))
    return total


def _occupancy(threads: int, registers: int, shared: int, arch: gpu.Architecture) -> float:
    warps = -(-threads // gpu.WARP_SIZE)
    # Registers are allocated to warps in units of 256.
    warp_registers = -(-registers * gpu.WARP_SIZE // 256) * 256
    blocks = min(
        arch.blocks,
        arch.threads // (warps * gpu.WARP_SIZE),
        gpu.SM_REGISTERS // (warp_registers * warps),
        arch.shared_bytes // (shared + gpu.RESERVED_SHARED),
    )
    return blocks * warps * gpu.WARP_SIZE / arch.threads


def _load_bytes(ptx: str) -> tuple[int, ...]:
    widths = {
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r"ld\.global(?:\.nc)?(?:\.v(\d))?\.[bufs](\d+)", ptx)
    }
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (\d+);", ptx)
    return tuple(sorted(widths | {int(width) for width in copies}))


def _assemble(
    nvcc: Path, source: str, arch: str, folder: Path
) -> tuple[str, dict[str, str], bytes]:
    """Return the PTX, ptxas's log for each kernel, and the cubin."""
    options = ("--ptxas-options=-v", "--keep", f"--keep-dir={folder}")
    log = run_nvcc(nvcc, source, arch, folder, options)
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    logs = dict(zip(parts[1::2], parts[2::2], strict=True))
    return (folder / "kernels.ptx").read_text(), logs, (folder / "kernels.cubin").read_bytes()


def _split_kernels(ptx: str) -> dict[str, str]:
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _count_instructions(cubin: bytes) -> dict[str, int]:
    """Count the instructions of each kernel in a cubin, which is a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry_size) for i in range(count)]
    strings = headers[names][4]
    counts = {}
    for name, _, _, _, offset, size in headers:
        end = cubin.index(b"\0", strings + name)
        section = cubin[strings + name : end].decode()
        if section.startswith(".text."):
            code = cubin[offset : offset + size]
            opcodes = [
                int.from_bytes(code[at : at + 2], "little") & _OPCODE_MASK
                for at in range(0, size, _INSTRUCTION_BYTES)
            ]
            while opcodes and opcodes[-1] in (_NOP, _BRANCH_TO_ITSELF):
                opcodes.pop()
            counts[section.removeprefix(".text.")] = len(opcodes)
    return counts
