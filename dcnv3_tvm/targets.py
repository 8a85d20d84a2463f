"""Targets: detection of this machine, names people type, and slugs for files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import machine
from dcnv3_tvm.errors import TargetError

if TYPE_CHECKING:
    from tvm.target import Target

_ALLOWED: Final = (
    '"auto", "cpu" or "llvm" (this machine), "cpu-<name>" such as "cpu-znver4", '
    '"llvm -mcpu=<name>", or a tvm.target.Target of kind llvm'
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
        ``-mabi``, ``-num-cores`` and ``-opt-level`` are understood too. A mapping is TVM's own
        form, ``{"kind": "llvm", "mcpu": "znver4"}``.

    Returns
    -------
    tvm.target.Target
        Of kind llvm. ``num-cores`` is present only if it was given: the number of cores is the
        machine's that runs the code.

    Raises
    ------
    TargetError
        If the target is not understood, is no CPU, or LLVM does not know the processor.

    Examples
    --------
    >>> target_slug(resolve_target("llvm -mcpu=znver4"))
    'cpu-znver4'
    """
    from tvm.target import Target

    if isinstance(target, Target):
        if target.kind.name != "llvm":
            raise TargetError("target is not a CPU", got=str(target), allowed=_ALLOWED)
        return target
    if isinstance(target, str):
        config = _parse(target)
    elif isinstance(target, Mapping):
        config = dict(target)
        if config.get("kind") != "llvm":
            raise TargetError("target is not a CPU", got=repr(target), allowed=_ALLOWED)
    else:
        raise TargetError("target is not understood", got=repr(target), allowed=_ALLOWED)
    if "mcpu" in config:
        _check_cpu(config)
    try:
        return Target(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TargetError(
            f"target is not understood by TVM ({error})", got=repr(target), allowed=_ALLOWED
        ) from error


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
