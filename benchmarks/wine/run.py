"""Compile a small InternImage for Windows, run it under Wine, and compare it with PyTorch.

    python benchmarks/wine/run.py --target windows-x86_64:v3

It takes ``wine``, ``ziglang`` and the network, from which pip downloads wheels for Windows. A
program in C calls the model, because Wine has no Python: the code, TVM's runtime library and its
threads are tested, and `dcnv3_tvm.load` is not.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import tvm_ffi

import dcnv3_tvm as dt
from dcnv3_tvm import frontend
from dcnv3_tvm.compiler import artifact, linker
from dcnv3_tvm.errors import FFI
from dcnv3_tvm.verify.random_weights import randomize_

_SIDE = 32
_ZIG = (sys.executable, "-m", "ziglang")
_IMPORTS = (
    "TVMFFIErrorMoveFromRaised",
    "TVMFFIFunctionCall",
    "TVMFFIFunctionGetGlobal",
    "TVMFFITensorFromDLPack",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="windows-x86_64", help="default: %(default)s")
    target = parser.parse_args().target
    model = randomize_(frontend.create_model("digits_internimage")).eval()
    image = np.random.default_rng(0).standard_normal((1, 3, _SIDE, _SIDE), np.float32)
    imported = frontend.import_model(model, example=image.shape)
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(image).double()).numpy()
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-wine-") as name:
        folder = Path(name)
        metadata = dt.compile_artifact(imported, folder / "artifact", target=target)
        weights = safetensors.numpy.load_file(folder / "artifact" / "weights.safetensors")
        arguments = [image, *(weights[name] for name in metadata.entries["main"].weights)]
        write_tensors(folder / "artifact" / "arguments.bin", arguments)
        download_libraries(folder / "artifact")
        build_host(folder / "artifact")
        environment = os.environ | {"WINEDEBUG": "-all", "WINEPREFIX": str(folder / "wine")}
        subprocess.run(["wine", "host.exe"], cwd=folder / "artifact", env=environment, check=True)
        result = np.fromfile(folder / "artifact" / "result.bin", np.float32)
        subprocess.run(["wineserver", "--kill"], env=environment, check=False)
    error = np.abs(result - expected.ravel()).max() / np.abs(expected).max()
    print(f"{metadata.target.slug}: error {error:.1e} of max |reference| in float64")


def write_tensors(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write the number of arrays, and of each its number of axes, its sizes and its values."""
    with path.open("wb") as stream:
        stream.write(struct.pack("<q", len(arrays)))
        for array in arrays:
            stream.write(struct.pack(f"<{1 + array.ndim}q", array.ndim, *array.shape))
            stream.write(np.ascontiguousarray(array, np.float32).tobytes())


def download_libraries(folder: Path) -> None:
    """Take tvm_ffi.dll, and Microsoft's runtime libraries, from wheels for Windows."""
    packages = (FFI, f"apache-tvm=={artifact.installed_versions()['tvm']}")
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--platform=win_amd64")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    subprocess.run([*command, *packages], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name == "tvm_ffi/lib/tvm_ffi.dll" or ".libs/" in name:
                    (folder / Path(name).name).write_bytes(archive.read(name))


def build_host(folder: Path) -> None:
    """Build the program that calls the model."""
    names = "\n".join(_IMPORTS)
    (folder / "host.def").write_text(f"LIBRARY tvm_ffi.dll\nEXPORTS\n{names}\n")
    imports, program = str(folder / "host.lib"), str(folder / "host.exe")
    make = [*_ZIG, "dlltool", "-m", "i386:x86-64", "-d", str(folder / "host.def"), "-l", imports]
    subprocess.run(make, check=True)
    headers = Path(tvm_ffi.__file__).parent / "include"
    probe = Path(linker.__file__).with_name("windows") / "stack_probe.s"
    command = [*_ZIG, "cc", "-target", "x86_64-windows-gnu", "-nostdlib", "-O1"]
    command += ["-fno-stack-protector", "-Wl,-e,Start", f"-I{headers}", "-o", program]
    sources = [str(Path(__file__).with_name("host.c")), str(probe), imports]
    subprocess.run([*command, *sources, "-lucrtbase", "-lkernel32"], check=True)


if __name__ == "__main__":
    main()
