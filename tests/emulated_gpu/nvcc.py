"""Compiler of the emulated GPU: translates generated CUDA source to a library for the processor.

It takes a folder that `prepare` filled and the command line that `compiler.cuda` passes to nvcc,
and writes the library that `driver.c` runs. Only the PTX instructions in `_INSTRUCTIONS` are
supported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

_OPTIONS: Final = (
    "-std=c++17",
    "-w",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",
    # Uninitialised variables are not zero, and misaligned accesses raise SIGILL.
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
)

_INSTRUCTIONS: Final = (
    (r"cp\.async\.wait_group (\d+);", "wait_for_copies"),
    (r"cp\.async\.commit_group;", "commit_copies"),
    (r"setp\.eq\.u32 p, %3, 1;.*@p cp\.async\.c[ag]\.shared\.global", "copy_or_clear"),
    (r"cp\.async\.c[ag]\.shared\.global", "copy"),
    (r"setp\.neu.*@p red\.global\.add\.v[24]\.f32", "add_vector"),
    (r"setp\.neu.*@p red\.global\.add\.f(?:32|64)", "add_elements"),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16", "load_matrix"),
    (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
        "multiply<emulated::from_half>",
    ),
    (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
        "multiply<emulated::from_bfloat>",
    ),
)
"""Patterns of inline PTX and the equivalent functions of `device.h`."""

_OF_WARPS: Final = ("load_matrix", "multiply")
_PREDICATED: Final = "copy_or_clear"

_FLUSH, _FAST_MATH = "--ftz=true", "--use_fast_math"

_REAL: Final = re.compile(r"\[|f/\*|\(float\)")
"""What operands of a division of real numbers contain, and those of indices rarely do."""

_ASM: Final = re.compile(r"(?:__asm__ __volatile__|asm volatile)\s*\(")
_KERNEL: Final = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\((?P<threads>\d+)[\d, ]*\) )?'
    r"(\w+)\((.*)\) \{$",
    re.MULTILINE,
)
_SHARED: Final = re.compile(r"__shared__ alignas\(\d+\) ([\w ]+) \w+\[(\d+)\];")
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},:]')
_KERNELS_A_PIECE: Final = 16

_HERE: Final = Path(__file__).parent
_HEADER, _HEADER_COMPILED, _DEVICE = "device.h", "device.h.gch", "device.o"


def prepare(folder: Path) -> None:
    """Compile what all kernels share.

    Raises
    ------
    OSError, subprocess.CalledProcessError
        If the C++ compiler, ``g++`` or ``$CXX``, is missing or fails.
    """
    header = [*_compiler("-O0"), "-x", "c++-header", str(_HERE / _HEADER)]
    device = [*_compiler("-O2"), "-c", str(_HERE / "device.cpp")]
    for command, name in ((header, _HEADER_COMPILED), (device, _DEVICE)):
        command += ["-o", str(folder / name)]
        subprocess.run(command, check=True, capture_output=True, text=True)


def main(prepared: Path, arguments: Sequence[str]) -> int:
    """Compile one file; return a non-zero exit code if a compiler fails."""
    source = next(Path(word) for word in arguments if word.endswith(".cu"))
    output = Path(arguments[arguments.index("-o") + 1])
    pieces = translate(source.read_text(encoding="utf-8"), arguments)
    compiler = [*_compiler("-O0"), f"-I{prepared}", f"-I{_HERE}", "-include", _HEADER]
    compiler += [
        f"-D__CUDA_ARCH__={arch}0" for arch in re.findall(r"-arch=sm_(\d+)", str(arguments))
    ]
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-emulated-") as folder:
        files = [Path(folder) / f"piece{i}.cpp" for i in range(len(pieces))]
        for file, text in zip(files, pieces, strict=True):
            file.write_text(text, encoding="utf-8")
        objects = [str(file.with_suffix(".o")) for file in files]

        def compile_piece(file: Path) -> int:
            command = [*compiler, "-c", str(file), "-o", str(file.with_suffix(".o"))]
            return subprocess.run(command, check=False).returncode

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            if any(pool.map(compile_piece, files)):
                return 1
        # Functions that every piece defines are identical.
        objects.append(str(prepared / _DEVICE))
        command = [compiler[0], "-shared", "-Wl,-z,muldefs", "-o", str(output), *objects]
        return subprocess.run(command, check=False).returncode


def _compiler(level: str) -> list[str]:
    return [os.environ.get("CXX", "g++"), level, *_OPTIONS]


def translate(source: str, options: Sequence[str] = ()) -> list[str]:
    """Translate generated CUDA source into C++ sources with a few kernels each.

    Parameters
    ----------
    source : str
        CUDA C++.
    options : sequence of str
        nvcc's options; those for inexact arithmetic are emulated.

    Raises
    ------
    ValueError
        If the source has no kernel, or inline PTX that is not in `_INSTRUCTIONS`, or an option is
        not supported.
    """
    if _FAST_MATH in options:
        raise ValueError(f"unsupported option: {_FAST_MATH}")
    heads = list(_KERNEL.finditer(source))
    if not heads:
        raise ValueError("the source has no kernels")
    begin = _language(source[: heads[0].start()])
    stops = [*(head.start() for head in heads[1:]), len(source)]
    kernels = [
        _kernel(head, source[head.start() : stop], options)
        for head, stop in zip(heads, stops, strict=True)
    ]
    step = _KERNELS_A_PIECE
    return ["\n".join([begin, *kernels[i : i + step]]) for i in range(0, len(kernels), step)]


def _kernel(head: re.Match[str], source: str, options: Sequence[str]) -> str:
    """Translate a kernel, and add its entry function and the sizes of its parameters."""
    name = head[2]
    types = [
        re.sub(r"\w+$", "", parameter.replace("__restrict__", "").strip()).strip()
        for parameter in _split(head[3], ",")
    ]
    arguments = ", ".join(f"*({kind} *)p[{i}]" for i, kind in enumerate(types))
    sizes = ", ".join(f"sizeof({kind})" for kind in types)
    shared = " + ".join(
        ["0", *(f"sizeof({kind}[{size}])" for kind, size in _SHARED.findall(source))]
    )
    export = 'extern "C" __attribute__((visibility("default")))'
    return f"""{_language(_inexact(source, options))}
{export} const char *emulated_{name}(const unsigned *c, void **p, int backwards) {{
  emulated::Launch config = {{{{c[0], c[1], c[2]}}, {{c[3], c[4], c[5]}}, c[6], backwards != 0,
                             {str(_FLUSH in options).lower()}}};
  return emulated::run([](void **p) {{ {name}({arguments}); }}, config, p);
}}
{export} const int emulated_{name}_bytes[] = {{{sizes}, 0}};
{export} const unsigned emulated_{name}_limits[] = {{{head["threads"] or 0}, {shared}}};
"""


def _inexact(source: str, options: Sequence[str]) -> str:
    """Replace what nvcc compiles to approximate instructions."""
    if "--prec-div=false" in options:
        for place in reversed([found.start() for found in re.finditer(" / ", source)]):
            start, end = _opening(source, place), _closing(source, place)
            a, b = source[start:place], source[place + 3 : end]
            if _REAL.search(a + b):
                source = f"{source[:start]}emulated::divide({a}, {b}){source[end:]}"
    if "--prec-sqrt=false" in options:
        source = re.sub(r"\bsqrtf\(", "emulated::square_root(", source)
    if _FLUSH in options:
        source = re.sub(r"\bexp2f\(", "emulated::power_of_2(", source)
    return source


def _language(source: str) -> str:
    source = re.sub(r"^\s*#include <(?:cuda|mma|math_constants).*$", "", source, flags=re.M)
    source = re.sub(
        r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];",
        r"\1 *\2 = (\1 *)emulated::shared;",
        source,
    )
    source = re.sub(
        r"__shared__ (alignas\(\d+\))",
        r'\1 static __attribute__((section("emulated_shared")))',
        source,
    )
    parts, last = [], 0
    for found in _ASM.finditer(source):
        end = _closing(source, found.end())
        parts += [source[last : found.start()], _instruction(source[found.end() : end])]
        last = end + 1
    return "".join([*parts, source[last:]])


def _instruction(statement: str) -> str:
    """Translate the operands of ``asm(...)`` to a function call."""
    code, *operands = _split(statement, ":")
    for pattern, name in _INSTRUCTIONS:
        found = re.search(pattern, code, re.DOTALL)
        if found is None:
            continue
        values = [
            operand.partition('"')[2].partition('"')[2].strip()
            for part in operands[:2]
            for operand in _split(part, ",")
        ]
        if found.groups():
            values = [found[1]]
        if name == _PREDICATED:
            values = values[:4]  # the last operand is the zero of the other branch
        if name.startswith(_OF_WARPS):
            values.insert(0, "__LINE__")
        return f"emulated::{name}({', '.join(values)})"
    raise ValueError(f"unsupported PTX: {code.strip()}")


def _opening(text: str, end: int) -> int:
    """Return the position after the bracket that is open at `end`."""
    depth = 0
    for place in range(end - 1, -1, -1):
        depth += (text[place] in ")]}") - (text[place] in "([{")
        if depth < 0:
            return place + 1
    raise ValueError("unbalanced brackets")


def _closing(text: str, start: int) -> int:
    """Return the position of the bracket that closes the one opened before `start`."""
    depth = 0
    for place, character in _code(text, start):
        if character in ")]}":
            if depth == 0:
                return place
            depth -= 1
        elif character in "([{":
            depth += 1
    raise ValueError("unbalanced brackets")


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets and strings; blank text has no parts."""
    parts, depth, last = [], 0, 0
    for place, character in _code(text, 0):
        if character in ")]}":
            depth -= 1
        elif character in "([{":
            depth += 1
        elif character == separator and depth == 0:
            parts.append(text[last:place].strip())
            last = place + 1
    parts.append(text[last:].strip())
    return parts if text.strip() else []


def _code(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Iterate over the brackets and separators outside strings from `start` on."""
    for found in _TOKEN.finditer(text, start):
        if found[0][0] != '"':
            yield found.start(), found[0]


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
