"""Targets: detection of this machine, names people type, and slugs for files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import gpu, machine
from dcnv3_tvm.errors import TargetError

if TYPE_CHECKING:
    from tvm.target import Target

_ALLOWED: Final = (
    '"auto", "cpu" or "llvm" (this machine), "cpu-<name>" such as "cpu-znver4", '
    '"llvm -mcpu=<name>", "cuda" (this machine\'s GPU), "cuda-<arch>" such as "cuda-sm90", or a '
    "tvm.target.Target of kind llvm or cuda"
)
_STRING_OPTIONS: Final = ("mcpu", "mtriple", "mabi", "mfloat-abi")
_INTEGER_OPTIONS: Final = ("num-cores", "opt-level")


def resolve_target(target: str | Mapping[str, Any] | Target = "auto") -> Target:
    """Turn what a user types into a TVM target.

    Parameters
    ----------
    target : str, mapping or tvm.target.Target
        ``"auto"``, ``"cpu"`` and ``"llvm"`` mean this machine's processor, as LLVM detects it.
        ``"cpu-znver4"`` and ``"llvm -mcpu=znver4"`` name another one; ``-mtriple``, ``-mattr``,
        ``-mabi``, ``-num-cores`` and ``-opt-level`` are understood too. ``"cuda"`` means this
        machine's first GPU, ``"cuda-sm90"`` and ``"cuda -arch=sm_90"`` any of that architecture.
        A mapping is TVM's own form, ``{"kind": "llvm", "mcpu": "znver4"}``.

    Returns
    -------
    tvm.target.Target
        Of kind llvm or cuda. ``num-cores`` is present only if it was given: the number of cores is
        the machine's that runs the code.

    Raises
    ------
    TargetError
        If the target is not understood, LLVM does not know the processor, kernels are not scheduled
        for the GPU's architecture, or this machine has no GPU where its own was asked for.

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
        config = _parse(target)
    elif isinstance(target, Mapping):
        config = dict(target)
    else:
        raise TargetError("target is not understood", got=repr(target), allowed=_ALLOWED)
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
            f"target is not understood by TVM ({error})", got=repr(target), allowed=_ALLOWED
        ) from error


def resolve_gpu(target: str | Mapping[str, Any] | Target) -> Target:
    """Turn what a user types into a target, where only a GPU makes sense.

    Parameters
    ----------
    target : str, mapping or tvm.target.Target
        As for `resolve_target`.

    Raises
    ------
    TargetError
        As from `resolve_target`, and if it is no GPU.
    """
    resolved = resolve_target(target)
    if not is_gpu(resolved):
        raise TargetError(
            "the target is no GPU",
            got=target_slug(resolved),
            allowed=", ".join(f"cuda-{arch.replace('_', '')}" for arch in gpu.ARCHITECTURES),
        )
    return resolved


def host_cpu() -> str:
    """Name LLVM's name of the processor this runs on, for example ``"znver4"``."""
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def target_slug(target: Target) -> str:
    """Name a target for files, records and test ids, for example ``"cpu-znver4"``."""
    if target.kind.name == "llvm":
        return f"cpu-{target.attrs.get('mcpu', 'generic')}"
    arch = str(target.attrs.get("arch", "")).replace("_", "")
    return "-".join(part for part in (target.kind.name, arch) if part)


def target_features(target: Target) -> frozenset[str]:
    """List LLVM's features of a CPU target, such as ``"avx512f"``; tuning flags included."""
    from tvm.target import codegen

    return frozenset(str(feature) for feature in codegen.llvm_get_cpu_features(target))


def vector_bits(target: Target) -> int:
    """Measure the widest vector register of a CPU target, in bits."""
    features = target_features(target)
    if "avx512f" in features:
        return 512
    if "avx" in features:
        return 256
    return 128


def vector_lanes(target: Target, dtype: str) -> int:
    """Count the elements of a dtype that one vector register of a CPU target holds."""
    from tvm import DataType

    return vector_bits(target) // int(DataType(dtype).bits)


def num_cores(target: Target) -> int:
    """Count the cores: the target's ``num-cores`` where given, else this process's."""
    given = target.attrs.get("num-cores")
    if given is not None and int(given) > 0:
        return int(given)
    return len(machine.usable_cores())


def is_gpu(target: Target) -> bool:
    """Tell whether kernels for a target run on a GPU."""
    return str(target.kind.name) == "cuda"


def gpu_architecture(target: Target) -> gpu.Architecture:
    """Return what a multiprocessor of a GPU target offers."""
    return gpu.ARCHITECTURES[str(target.attrs["arch"])]


def _cuda(config: Mapping[str, Any]) -> Target:
    """Build a GPU target; its host part is for any processor of this architecture."""
    from tvm.target import Target

    arch = str(config.get("arch") or gpu.device().arch)
    if arch not in gpu.ARCHITECTURES:
        raise TargetError(
            "kernels are not scheduled for this GPU architecture",
            got=arch,
            allowed=", ".join(gpu.ARCHITECTURES),
            hint="A target is written as cuda-sm90; GPUs older than sm_80 are not supported.",
        )
    return Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})


def _host_config() -> dict[str, Any]:
    return {"kind": "llvm", "mcpu": host_cpu()}


def _parse(text: str) -> dict[str, Any]:
    words = shlex.split(text)
    if not words:
        raise TargetError("target is empty", got=repr(text), allowed=_ALLOWED)
    kind, options = words[0], words[1:]
    if kind in ("auto", "cpu") and not options:
        return _host_config()
    if kind.startswith("cpu-") and not options:
        return {"kind": "llvm", "mcpu": kind.removeprefix("cpu-")}
    if kind == "cuda" or kind.startswith("cuda-"):
        return _parse_cuda(text, kind, options)
    if kind != "llvm":
        raise TargetError("target is unknown", got=repr(text), allowed=_ALLOWED)
    if not options:
        return _host_config()
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
    """Refuse a processor that LLVM does not know: TVM would only print, and build generic code."""
    from tvm.target import Target, codegen

    base = {"kind": "llvm"}
    if "mtriple" in config:
        base["mtriple"] = config["mtriple"]
    known = sorted(str(name) for name in codegen.llvm_get_cpu_archlist(Target(base)))
    if config["mcpu"] not in known:
        raise TargetError(
            "LLVM does not know the processor",
            got=f"mcpu={config['mcpu']!r}",
            allowed=", ".join(known),
            hint='Use "auto" for this machine, or a name of the list.',
        )
