"""The errors this library raises.

A message says, in this order: what is wrong, what was given, what is allowed, what to do.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing import Any

FFI: Final = "apache-tvm-ffi>=0.1.14.post0,<0.1.15"
"""What pip installs to run compiled models."""

# Of the shells of Windows, cmd knows only double quotes.
INSTALL_FFI: Final = f'Run: pip install "{FFI}"'
"""Hint where the runtime library of compiled models is missing."""

# apache-tvm alone would come with tvm-ffi 0.1.15. See tvm_workarounds: ffi-json.
INSTALL_TVM: Final = f"{INSTALL_FFI} apache-tvm==0.27.0.post1"
"""Hint where TVM's compiler is missing."""

INSTALL_CROSS: Final = 'Run: pip install "dcnv3-tvm[cross]"'
"""Hint where there is no linker for a system."""


class DCNv3Error(Exception):
    """Base of all errors raised by this library.

    Parameters
    ----------
    problem : str
        What is wrong, as a clause without a full stop.
    got : object, optional
        What was given.
    allowed : object, optional
        What is accepted.
    hint : str, optional
        What to do, as a sentence.
    """

    def __init__(
        self,
        problem: str,
        *,
        got: object | None = None,
        allowed: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.got = got
        self.allowed = allowed
        self.hint = hint
        parts = [problem]
        if got is not None:
            parts.append(f"got {got}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        message = "; ".join(parts) + "."
        if hint is not None:
            message += f" {hint}"
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as text, which a process pool sends from its workers."""
        details: dict[str, Any] = {
            name: None if value is None else str(value)
            for name, value in (("got", self.got), ("allowed", self.allowed), ("hint", self.hint))
        }
        return functools.partial(type(self), **details), (self.problem,)


def os_reason(error: OSError, path: object) -> str:
    """Return what the system says, and of which file: `path` if it names none."""
    # The second file is the one that is written, where two are given.
    return f"{error.strerror or error} ({error.filename2 or error.filename or path})"


class DCNv3Warning(UserWarning):
    """Something was done in another way than asked for."""


class InvalidArgumentError(DCNv3Error, ValueError):
    """An argument has an invalid value, shape, layout or dtype."""


class CheckpointError(DCNv3Error, ValueError):
    """A checkpoint cannot be read, or does not match the model."""


class ModelImportError(DCNv3Error):
    """A model cannot be converted to Relax."""


class ModelExportError(DCNv3Error):
    """A model cannot be exported."""


class CompileError(DCNv3Error):
    """A model or an operator cannot be compiled for the target."""


class TargetError(DCNv3Error, ValueError):
    """A target is unknown, or is not the machine that runs the code."""


class ArtifactError(DCNv3Error):
    """A compiled artifact cannot be read, was modified, or is for another machine."""


class DeviceError(DCNv3Error, RuntimeError):
    """The GPU has too little free memory, or failed during a computation."""


class ImageError(DCNv3Error, ValueError):
    """A file is not a readable image."""


class TuningError(DCNv3Error):
    """A tuning session cannot start or continue; all measured trials are kept."""


class MissingDependencyError(DCNv3Error, ImportError):
    """An optional package that the call needs is not installed."""


def raise_if_tvm_is_missing(error: ModuleNotFoundError, user: str) -> None:
    """Raise a `MissingDependencyError` if the module that was not found is TVM's compiler.

    Parameters
    ----------
    error : ModuleNotFoundError
        What an import raised.
    user : str
        What needs the compiler, for the message.
    """
    if error.name is not None and error.name.partition(".")[0] == "tvm":
        raise MissingDependencyError(
            f"{user} needs TVM's compiler, which is not installed", hint=INSTALL_TVM
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
