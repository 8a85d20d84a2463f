"""Compilation targets: parsing, detection of this machine, slugs, and CPU vector widths."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import gpu, machine
from dcnv3_tvm.errors import TargetError
from dcnv3_tvm.systems import SYSTEMS, System, system_of, this_system

if TYPE_CHECKING:
    from tvm.target import Target

AUTO: Final = "auto"
"""The target that stands for this machine's processor."""

_ALLOWED: Final = (
    '"auto", "cpu" or "llvm" (this machine), "cpu-<name>" such as "cpu-znver4", '
    f"{', '.join(SYSTEMS)} (such as linux-aarch64:neoverse-n1), "
    '"llvm -mcpu=<name>", "cuda" (this machine\'s GPU), "cuda-<arch>" such as "cuda-sm90", or a '
    "tvm.target.Target of kind llvm or cuda"
)
_STRING_OPTIONS: Final = ("mcpu", "mtriple", "mabi", "mfloat-abi")
_INTEGER_OPTIONS: Final = ("num-cores", "opt-level")
_UNLISTED_CPUS: Final = {"apple-a14": "apple-m1", "apple-a15": "apple-m2", "apple-a16": "apple-m3"}
"""Names of processors that LLVM knows but does not list, by the name that it lists."""


def resolve_target(target: str | Mapping[str, Any] | Target = "auto") -> Target:
    """Convert a target to TVM's form.

    Parameters
    ----------
    target : str, mapping or tvm.target.Target
        ``"auto"``, ``"cpu"`` and ``"llvm"`` mean this machine's processor, as LLVM detects it.
        ``"cpu-znver4"`` and ``"llvm -mcpu=znver4"`` name another one; ``-mtriple``, ``-mattr``,
        ``-mabi``, ``-num-cores`` and ``-opt-level`` are supported too. ``"linux-aarch64"`` and the
        other names of `dcnv3_tvm.systems.SYSTEMS` mean another operating system, followed by
        ``":neoverse-n1"`` or ``":v3"`` (x86-64-v3) for a processor. ``"cuda"`` means this
        machine's first GPU, ``"cuda-sm90"`` and ``"cuda -arch=sm_90"`` any GPU of that
        architecture. A mapping is TVM's own form, ``{"kind": "llvm", "mcpu": "znver4"}``.

    Returns
    -------
    tvm.target.Target
        Of kind llvm or cuda. It has ``num-cores`` only if that was given, because the machine that
        runs the code determines the number of cores.

    Raises
    ------
    TargetError
        If the target is invalid, LLVM does not know the processor, the GPU's architecture is not
        supported, or this machine's GPU was requested and it has none.

    Examples
    --------
    >>> target_slug(resolve_target("llvm -mcpu=znver4"))
    'cpu-znver4'
    """
    from tvm.target import Target

    if isinstance(target, Target):
        config = dict(target.export())
        config.pop("tag", None)
    elif isinstance(target, str):
        config = _parse(target) or _host_config()
    elif isinstance(target, Mapping):
        config = dict(target)
    else:
        raise TargetError("target is not valid", got=repr(target), allowed=_ALLOWED)
    kind = config.get("kind")
    if kind == "cuda":
        return _cuda(config)
    if kind != "llvm":
        raise TargetError(
            "target is neither a CPU nor an NVIDIA GPU", got=str(target), allowed=_ALLOWED
        )
    if isinstance(target, Target):
        return target
    if "mcpu" in config:
        _check_cpu(config)
    try:
        return Target(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TargetError(
            f"TVM rejects the target ({error})", got=repr(target), allowed=_ALLOWED
        ) from error


def target_text(target: str | Mapping[str, Any] | Target) -> str:
    """Return a target as text that `target_from_text` reads; TVM is not imported for a string.

    Parameters
    ----------
    target : str, mapping or tvm.target.Target
        As for `resolve_target`. LLVM checks the name of a processor only in `target_from_text`.

    Returns
    -------
    str
        `AUTO` for this machine's processor, otherwise JSON.

    Raises
    ------
    TargetError
        As for `resolve_target`.

    Examples
    --------
    >>> target_text("cpu-znver4") == target_text("llvm -mcpu=znver4")
    True
    """
    if not isinstance(target, str):
        return str(resolve_target(target))
    config = _parse(target)
    if config is None:
        return AUTO
    if config["kind"] == "cuda":
        config["arch"] = _gpu_arch(config)
    return json.dumps(config, sort_keys=True)


def target_from_text(text: str) -> Target:
    """Return the target that `target_text` wrote.

    Raises
    ------
    TargetError
        As for `resolve_target`.
    """
    return resolve_target(text if text == AUTO else json.loads(text))


def resolve_gpu(target: str | Mapping[str, Any] | Target) -> Target:
    """Convert a target to TVM's form, where a GPU is required.

    Parameters
    ----------
    target : str, mapping or tvm.target.Target
        As for `resolve_target`.

    Raises
    ------
    TargetError
        As for `resolve_target`, and if it is not a GPU.
    """
    resolved = resolve_target(target)
    if not is_gpu(resolved):
        raise TargetError(
            "the target is not a GPU",
            got=target_slug(resolved),
            allowed=", ".join(map(gpu.target_name, gpu.ARCHITECTURES)),
        )
    return resolved


def host_cpu() -> str:
    """Return LLVM's name of this machine's processor, for example ``"znver4"``."""
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def target_slug(target: Target) -> str:
    """Return a target's name for records and test ids, for example ``"cpu-znver4"``.

    It names the processor, whatever its operating system.
    """
    if target.kind.name == "llvm":
        return f"cpu-{target.attrs.get('mcpu', 'generic')}"
    return gpu.target_name(str(target.attrs["arch"]))


def target_system(target: Target) -> System | None:
    """Return the system that runs a target's code, or its GPU's host; None if unknown."""
    host = target.host if is_gpu(target) else target
    triple = host.attrs.get("mtriple")
    return this_system() if triple is None else system_of(str(triple))


def artifact_slug(target: Target) -> str:
    """Return a target's short name, which tells another system than this machine's.

    Examples
    --------
    >>> artifact_slug(resolve_target("macos-arm64"))
    'macos-arm64-apple-m1'
    """
    system = target_system(target)
    if is_gpu(target) or system in (None, this_system()):
        return target_slug(target)
    return system.slug(str(target.attrs.get("mcpu", "generic")))


def target_features(target: Target) -> frozenset[str]:
    """Return LLVM's features of a CPU target, such as ``"avx512f"``, including tuning flags."""
    from tvm.target import codegen

    return frozenset(str(feature) for feature in codegen.llvm_get_cpu_features(target))


def vector_bits(target: Target) -> int:
    """Return the width of a CPU target's vector registers, in bits."""
    features = target_features(target)
    if "avx512f" in features:
        return 512
    if "avx" in features:
        return 256
    return 128


def is_aarch64(target: Target) -> bool:
    """Return whether a CPU target is a 64-bit Arm processor, all of which have NEON."""
    return "fp-armv8" in target_features(target)


def has_bfloat16_dot(target: Target) -> bool:
    """Whether a CPU target has dot products of bfloat16 pairs that are fast.

    On AArch64, ``bfdot`` does twice the multiply-adds of ``fmla``. AVX512-BF16 is slow on Intel's
    processors since Sapphire Rapids, which have AMX instead: on Emerald Rapids, ``vdpbf16ps`` does
    half the operations per second of float32's ``vfmadd231ps``. Their AVX512-FP16 tells them apart.
    On Cooper Lake, Intel published 1.8 times the speed of float32.
    """
    features = target_features(target)
    if is_aarch64(target):
        return "bf16" in features
    return "avx512bf16" in features and "avx512fp16" not in features


def has_fast_bfloat16(target: Target) -> bool:
    """Whether matmuls in bfloat16 are faster than in float32 on a CPU target."""
    return has_amx(target) or has_bfloat16_dot(target)


def has_amx(target: Target) -> bool:
    """Whether a CPU target has matrix tiles of bfloat16 (AMX)."""
    return target_features(target) >= machine.AMX_FEATURES


def vector_lanes(target: Target, dtype: str) -> int:
    """Return the number of elements of a dtype in a vector register of a CPU target."""
    from tvm import DataType

    return vector_bits(target) // int(DataType(dtype).bits)


def num_cores(target: Target) -> int:
    """Return the target's ``num-cores`` if given, else the cores available to this process."""
    given = target.attrs.get("num-cores")
    if given is not None and int(given) > 0:
        return int(given)
    return len(machine.usable_cores())


def is_gpu(target: Target) -> bool:
    """Return whether a target is a GPU."""
    return str(target.kind.name) == "cuda"


def gpu_architecture(target: Target) -> gpu.Architecture:
    """Return the limits of a GPU target's SMs."""
    return gpu.ARCHITECTURES[str(target.attrs["arch"])]


def _cuda(config: Mapping[str, Any]) -> Target:
    """Return a GPU target whose host code runs on any processor of this system."""
    from tvm.target import Target

    arch = _gpu_arch(config)
    triple = str((config.get("host") or {}).get("mtriple", ""))
    if triple and not this_system().runs(triple):
        raise TargetError(
            "GPU code for another system is not supported",
            got=f"a host with mtriple {triple}",
            allowed=f"{this_system().name} (this machine)",
            hint="Compile on a machine of that system.",
        )
    if arch not in gpu.ARCHITECTURES:
        raise TargetError(
            "the GPU architecture is not supported",
            got=arch,
            allowed=", ".join(gpu.ARCHITECTURES),
            hint="A target is written as cuda-sm90; GPUs older than sm_80 are not supported.",
        )
    return Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})


def _gpu_arch(config: Mapping[str, Any]) -> str:
    return str(config.get("arch") or gpu.device().arch)


def _host_config() -> dict[str, Any]:
    """Return this machine's processor, without features that its system hides or denies."""
    from tvm.target import Target

    config: dict[str, Any] = {"kind": "llvm", "mcpu": host_cpu()}
    features = target_features(Target(config))
    hidden = machine.missing_features(features)
    if features >= machine.AMX_FEATURES and not machine.offers_amx():
        hidden = sorted(machine.AMX_FEATURES.union(hidden))
    return config | {"mattr": [f"-{name}" for name in hidden]} if hidden else config


def _parse(text: str) -> dict[str, Any] | None:
    """Return TVM's form of a target; None for this machine's processor."""
    words = shlex.split(text)
    if not words:
        raise TargetError("target is empty", got=repr(text), allowed=_ALLOWED)
    kind, options = words[0], words[1:]
    if kind in (AUTO, "cpu", "llvm") and not options:
        return None
    if kind.startswith("cpu-") and not options:
        return {"kind": "llvm", "mcpu": kind.removeprefix("cpu-")}
    system, colon, processor = kind.partition(":")
    if system in SYSTEMS and not options and bool(colon) == bool(processor):
        found = SYSTEMS[system]
        return {"kind": "llvm", "mtriple": found.triple, "mcpu": found.processor(processor)}
    if kind == "cuda" or kind.startswith("cuda-"):
        return _parse_cuda(text, kind, options)
    if kind != "llvm":
        raise TargetError("target is unknown", got=repr(text), allowed=_ALLOWED)
    config: dict[str, Any] = {"kind": "llvm"}
    for option in options:
        name, _, value = option.lstrip("-").partition("=")
        if not option.startswith("-") or not value:
            raise TargetError(
                "a target option has no value",
                got=repr(option),
                allowed="-name=value, for example -mcpu=znver4",
            )
        if name in _STRING_OPTIONS:
            config[name] = value
        elif name == "mattr":
            config[name] = value.split(",")
        elif name in _INTEGER_OPTIONS and value.isdigit():
            config[name] = int(value)
        else:
            raise TargetError(
                "a target option is unknown",
                got=repr(option),
                allowed=", ".join(f"-{n}" for n in (*_STRING_OPTIONS, "mattr", *_INTEGER_OPTIONS)),
            )
    return config


def _parse_cuda(text: str, kind: str, options: list[str]) -> dict[str, Any]:
    arch = kind.partition("-")[2]
    if options and not arch:
        name, _, arch = options.pop(0).partition("=")
        if name != "-arch" or not arch:
            raise TargetError("target is unknown", got=repr(text), allowed=_ALLOWED)
    if options:
        raise TargetError("target is unknown", got=repr(text), allowed=_ALLOWED)
    if arch and "_" not in arch:
        arch = arch.replace("sm", "sm_", 1)
    return {"kind": "cuda", "arch": arch}


def _check_cpu(config: Mapping[str, Any]) -> None:
    """Reject a CPU that LLVM does not know. See tvm_workarounds: unknown-cpu."""
    from tvm.target import Target, codegen

    base = {"kind": "llvm"}
    if "mtriple" in config:
        base["mtriple"] = config["mtriple"]
    listed = {str(name) for name in codegen.llvm_get_cpu_archlist(Target(base))}
    known = sorted(listed.union(_UNLISTED_CPUS[name] for name in listed & _UNLISTED_CPUS.keys()))
    if config["mcpu"] not in known:
        raise TargetError(
            "LLVM does not know the processor",
            got=f"mcpu={config['mcpu']!r}",
            allowed=", ".join(known),
            hint='Use "auto" for this machine, or a name from the list.',
        )
