"""The cache of compiled kernels on disk."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

from dcnv3_tvm.compiler import compile_kernel as compilation
from dcnv3_tvm.compiler import kernel_cache
from dcnv3_tvm.compiler.kernel_cache import CachedKernel
from dcnv3_tvm.environment import DCNV3_TVM_CACHE
from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.spec import DCNv3Spec
from helpers.specs import random_inputs

SPEC = DCNv3Spec.of((1, 5, 4, 6), group=2)
ENTRY = CachedKernel({"rule": "dcnv3"}, b"\x7fELF\n and\nmore")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DCNV3_TVM_CACHE.name, str(tmp_path / "cache"))
    return tmp_path / "cache"


def compile_anew(spec=SPEC, target="auto", database="none"):
    """Compile as a new process does, whose memory holds no kernels."""
    return compilation.compile_kernel.__wrapped__("dcnv3", spec, target, database)


def assert_computes(kernel, spec=SPEC):
    inputs = random_inputs(spec)
    arrays = (inputs.x, inputs.offset, inputs.mask)
    out = np.full(spec.output_shape, np.nan, np.float32)
    kernel.run("cpu", (*arrays, out))
    np.testing.assert_allclose(out, dcnv3_reference(*arrays, spec), rtol=1e-5, atol=1e-5)


@pytest.fixture
def no_compiler(monkeypatch):
    """Return a function after which compilation fails."""

    def fail(*_arguments):
        raise CompileError("compiled again")

    return lambda: monkeypatch.setattr(compilation, "_compile", fail)


def test_an_entry_is_read_as_written(folder):
    assert kernel_cache.read("ab") is None
    kernel_cache.write("ab", ENTRY)
    assert kernel_cache.read("ab") == ENTRY
    assert kernel_cache.read("cd") is None
    assert kernel_cache.used_bytes() == (folder / "ab.kernel").stat().st_size


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40], lambda b: b[:-1] + b"!"])
def test_a_damaged_entry_is_ignored_and_replaced(folder, damage):
    kernel_cache.write("ab", ENTRY)
    path = folder / "ab.kernel"
    path.write_bytes(damage(path.read_bytes()))
    assert kernel_cache.read("ab") is None
    kernel_cache.write("ab", ENTRY)
    assert kernel_cache.read("ab") == ENTRY


def test_the_least_recently_used_entries_are_removed(folder, monkeypatch):
    for age, key in enumerate(("newest", "middle", "oldest")):
        kernel_cache.write(key, ENTRY)
        os.utime(folder / f"{key}.kernel", (1e9 - age, 1e9 - age))
    (folder / ".ab.kernel.0123abcd.kernel").touch()  # Of a process that was killed.
    os.utime(folder / ".ab.kernel.0123abcd.kernel", (0, 0))
    assert kernel_cache.read("oldest") == ENTRY
    monkeypatch.setattr(kernel_cache, "LIMIT", kernel_cache.used_bytes())
    kernel_cache.write("another", ENTRY)
    names = {path.name for path in folder.iterdir()}
    assert names == {"newest.kernel", "oldest.kernel", "another.kernel"}


def test_no_entry_of_another_user_is_read(folder, monkeypatch):
    kernel_cache.write("ab", ENTRY)
    os.chown(folder / "ab.kernel", 1234, -1) if os.getuid() == 0 else monkeypatch.setattr(
        os, "getuid", lambda: 1234
    )
    assert kernel_cache.read("ab") is None


def test_place(tmp_path, monkeypatch):
    monkeypatch.delenv(DCNV3_TVM_CACHE.name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kernel_cache.cache_folder() == tmp_path / ".cache" / "dcnv3-tvm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert kernel_cache.cache_folder() == tmp_path / "x" / "dcnv3-tvm"
    monkeypatch.setenv(DCNV3_TVM_CACHE.name, "off")
    assert kernel_cache.cache_folder() is None
    kernel_cache.write("ab", ENTRY)
    assert (kernel_cache.read("ab"), kernel_cache.used_bytes()) == (None, 0)


def test_a_second_process_takes_the_kernel_from_disk(folder, no_compiler):
    compiled = compile_anew()
    (path,) = folder.iterdir()
    assert b"dcnv3 dcnv3-n1-h5-w4-c6" in path.read_bytes()
    no_compiler()
    taken = compile_anew()
    assert taken == compiled
    assert_computes(taken)
    with pytest.raises(CompileError, match="compiled again"):
        compile_anew(target='{"kind": "llvm", "mcpu": "x86-64"}')
    with pytest.raises(CompileError, match="compiled again"):
        compile_anew(database="default")


@pytest.mark.usefixtures("folder")
def test_tvm_is_not_imported_for_a_kernel_on_disk():
    compile_anew(database="default")
    code = (
        "import sys, numpy as np, dcnv3_tvm as dt\n"
        "x, offset, mask = (np.ones((1, 5, 4, c), 'float32') for c in (6, 36, 18))\n"
        "dt.dcnv3(x, offset, mask, group=2)\n"
        "print('tvm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        ("dcnv3_tvm.machine", "cpu_identity", lambda: ("another",)),
        ("dcnv3_tvm.machine", "usable_cores", lambda: set(range(99))),
        ("dcnv3_tvm.compiler.compile_kernel", "installed_version", lambda _: "0.99"),
        ("dcnv3_tvm.compiler.compile_kernel", "_sources_digest", lambda: "edited"),
    ],
)
def test_the_key_depends_on(monkeypatch, owner, name, value):
    def key():
        return compilation._key("dcnv3", SPEC, "auto", "none")

    before = key()
    monkeypatch.setattr(importlib.import_module(owner), name, value)
    assert key() != before


def test_the_key_depends_on_tuning_records(tmp_path):
    def key():
        return compilation._key("dcnv3", SPEC, "auto", str(tmp_path))

    keys = {key()}
    for folder in (tmp_path, tmp_path / "records"):
        folder.mkdir(exist_ok=True)
        (folder / "records.jsonl").write_text("{}")
        keys.add(key())
    assert len(keys) == 3


def test_without_a_linker_nothing_is_kept(folder, monkeypatch):
    monkeypatch.setattr(compilation, "find_ld", lambda: None)
    assert_computes(compile_anew())
    assert kernel_cache.used_bytes() == 0
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    folder.parent.joinpath("file").touch()
    monkeypatch.setenv(DCNV3_TVM_CACHE.name, str(folder.parent / "file" / "cache"))
    assert_computes(compile_anew())
