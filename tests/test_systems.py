import sys

import pytest

from dcnv3_tvm import machine
from dcnv3_tvm.systems import SYSTEMS, system_of, this_system


@pytest.mark.parametrize(
    ("triple", "name"),
    [
        ("x86_64-conda-linux-gnu", "linux-x86_64"),
        ("aarch64-linux-gnu", "linux-aarch64"),
        ("arm64-apple-darwin22.6.0", "macos-arm64"),
        ("x86_64-pc-windows-msvc", "windows-x86_64"),
        *((system.triple, name) for name, system in SYSTEMS.items()),
    ],
)
def test_system_of_a_triple(triple, name):
    assert system_of(triple) == SYSTEMS[name]
    assert [other for other, system in SYSTEMS.items() if system.runs(triple)] == [name]


@pytest.mark.parametrize("triple", ["", "x86_64", "riscv64-unknown-linux-gnu", "wasm32-wasi"])
def test_unknown_triple(triple):
    assert system_of(triple) is None


@pytest.mark.parametrize(
    ("platform", "architecture", "name"),
    [
        ("linux", "x86_64", "linux-x86_64"),
        ("darwin", "aarch64", "macos-arm64"),
        ("win32", "x86_64", "windows-x86_64"),
        ("linux", "riscv64", "linux-riscv64"),
    ],
)
def test_this_system(monkeypatch, platform, architecture, name):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(machine, "architecture", lambda: architecture)
    found = this_system.__wrapped__()
    assert found.name == name
    assert found.runtime_library == SYSTEMS.get(name, SYSTEMS["linux-x86_64"]).runtime_library


def test_processors():
    x86, arm = SYSTEMS["windows-x86_64"], SYSTEMS["linux-aarch64"]
    assert [x86.processor(name) for name in ("", "v2", "znver4")] == [
        "x86-64-v3",
        "x86-64-v2",
        "znver4",
    ]
    assert arm.processor("v3") == "v3"  # It is no level there, and LLVM rejects it.
    assert x86.slug("x86-64-v4") == "windows-x86_64-v4"
    assert arm.slug(arm.processor()) == "linux-aarch64"
