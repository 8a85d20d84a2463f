"""Linking for this system and others."""

import ctypes
import math
import subprocess
import sys

import numpy as np
import pytest

from dcnv3_tvm import runtime
from dcnv3_tvm.compiler import linker
from dcnv3_tvm.compiler.linker import find_linker
from dcnv3_tvm.errors import MissingDependencyError
from dcnv3_tvm.systems import SYSTEMS, this_system
from helpers.binaries import Binary
from helpers.toy import Toy

OTHERS = sorted(SYSTEMS.keys() - {this_system().name})

LARGE_STACK_AND_MATH = """
float erff(float);
void *memcpy(void *, const void *, unsigned long long);
__attribute__((visibility("default"))) float compute(const char *from, float x) {
  volatile char large[20000];
  memcpy((void *)large, from, sizeof large);
  return erff(x) + large[(int)x];
}
"""


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(linker, "_COMPILERS", ())


@pytest.fixture
def without_ziglang(monkeypatch):
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda _: None)


def write_compiler(path, triple, code=0):
    path.write_text(f"#!/bin/sh\necho {triple}\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def here():
    return Binary.read(Toy.build(target=this_system().name).code)


@pytest.mark.parametrize("name", OTHERS)
def test_library_for_another_system(here, name):
    toy = Toy.build(target=name)
    assert toy.metadata.target.system == SYSTEMS[name]
    found = Binary.read(toy.code)
    kinds = {"linux": "ELF", "macos": "Mach-O", "windows": "PE"}
    assert found.kind == kinds[SYSTEMS[name].operating_system]
    assert found.machine == toy.metadata.target.architecture

    def looked_up(binary):
        return {symbol for symbol in binary.exports if symbol.startswith(("__tvm_", "__TVM"))}

    pool = {symbol for symbol in here.exports if symbol.startswith("__tvm_ffi_dcnv3_")}
    assert len(pool) == 2
    without = set() if found.kind == "ELF" else pool
    assert looked_up(found) == looked_up(here) - without >= {"__tvm_ffi__library_bin"}
    # What it calls where a check fails.
    assert "TVMFFIErrorSetRaisedFromCStrParts" in found.imports
    assert found.libraries <= {"ucrtbase.dll", "tvm_ffi.dll", "/usr/lib/libSystem.B.dylib"}
    # Apple's processors run only code with a signature.
    assert found.signed == (found.kind == "Mach-O")


def test_library_of_an_installed_compiler_loads_where_glibc_is_older(here):
    """It needs no later version than TVM's runtime library."""
    assert find_linker(this_system()).command[0] != sys.executable
    versions = [name.partition("_")[2].split(".") for name in here.versions if "GLIBC_" in name]
    oldest = this_system().zig.partition("gnu.")[2].split(".")
    assert max(list(map(int, version)) for version in versions) <= list(map(int, oldest))


@pytest.mark.parametrize("name", sorted(SYSTEMS))
@pytest.mark.usefixtures("without_compiler")
def test_imports_are_in_the_system(tmp_path, name):
    source, code, library = tmp_path / "x.c", tmp_path / "x.o", tmp_path / "x.so"
    source.write_text(LARGE_STACK_AND_MATH)
    command = [sys.executable, "-m", "ziglang", "cc", "-target", SYSTEMS[name].zig, "-c"]
    subprocess.run([*command, "-O1", "-fPIC", "-o", code, source], check=True)
    find_linker(SYSTEMS[name])(str(library), [str(code)])
    found = Binary.read(library.read_bytes())
    assert "compute" in found.exports
    assert found.imports >= {"erff", "memcpy"}
    needed = {"linux": set(), "macos": {"/usr/lib/libSystem.B.dylib"}, "windows": {"ucrtbase.dll"}}
    assert found.libraries == needed[SYSTEMS[name].operating_system]
    if name == this_system().name:
        compute = ctypes.CDLL(str(library)).compute
        compute.restype, compute.argtypes = ctypes.c_float, (ctypes.c_char_p, ctypes.c_float)
        assert compute(b"\x07" + bytes(20000), 0.5) == pytest.approx(7 + math.erf(0.5), rel=1e-6)


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler(tmp_path):
    toy = Toy.build(target=this_system().name)
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8), np.float32)
    model = runtime.load(toy.write(tmp_path / "artifact"))
    np.testing.assert_array_equal(model(image), toy.main(image))


@pytest.mark.usefixtures("without_compiler", "without_ziglang")
def test_nothing_that_links():
    with pytest.raises(MissingDependencyError, match=r'Run: pip install "dcnv3-tvm\[cross\]"'):
        find_linker(SYSTEMS["windows-x86_64"])


@pytest.mark.usefixtures("without_ziglang")
def test_chosen_compiler(monkeypatch, tmp_path):
    chosen = write_compiler(tmp_path / "my c++", "aarch64-linux-gnu")
    monkeypatch.setenv("CXX", chosen)
    assert find_linker(SYSTEMS["linux-aarch64"]).command[:2] == (chosen, "-shared")
    with pytest.raises(MissingDependencyError, match=r"macos-arm64, and \$CXX .* another system"):
        find_linker(SYSTEMS["macos-arm64"])
    assert find_linker(this_system()).command[0] != chosen
    monkeypatch.setenv("CXX", f"env X=1 '{chosen}'")
    assert find_linker(SYSTEMS["linux-aarch64"]).command[:3] == ("env", "X=1", chosen)
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "old", "unknown option", code=1))
    assert find_linker(SYSTEMS["macos-arm64"]).command[0] == str(tmp_path / "old")
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(MissingDependencyError, match=r"CXX names cannot be run; got CXX=.*none"):
        find_linker(this_system())
