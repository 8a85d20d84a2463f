"""What a schedule rule is, and how it says that it does not apply."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from tvm import tirx
from tvm.target import Target

from dcnv3_tvm.op.expr import KERNEL_ATTR
from dcnv3_tvm.schedules.space import SearchSpace


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a rule does not apply to a kernel.

    Parameters
    ----------
    reason : str
        What the rule needs and what the kernel has, such as ``"needs 16 channels per group; got
        12"``. `dcnv3_tvm.explain` prints it after the rule's name.
    """

    reason: str


class Rule(Protocol):
    """A function that schedules one kind of kernel for one kind of target.

    It only transforms the function it is given: which variant of a kernel a target needs is decided
    when the Relax operator is lowered. Whatever a tuner may choose differently, it gets from
    `SearchSpace.pick`. If a schedule primitive raises `tvm.s_tir.schedule.ScheduleError`, the next
    rule is tried.
    """

    __name__: str

    def __call__(
        self, func: tirx.PrimFunc, target: Target, space: SearchSpace, /
    ) -> tirx.PrimFunc | Refusal:
        """Schedule a kernel.

        Parameters
        ----------
        func : tvm.tirx.PrimFunc
            Unscheduled kernel.
        target : tvm.target.Target
            Target to schedule for, of the kind that the rule is registered for.
        space : SearchSpace
            Decisions to take instead of the defaults; collects the candidates of each.

        Returns
        -------
        tvm.tirx.PrimFunc or Refusal
            The scheduled function, or why the rule does not apply.
        """
        ...


def kernel_name(func: tirx.PrimFunc) -> str | None:
    """Return which of this library's kernels a function is; None for TVM's stock operators."""
    name = func.attrs.get(KERNEL_ATTR) if func.attrs else None
    return None if name is None else str(name)


def refuse_other_kernels(func: tirx.PrimFunc, *names: str) -> Refusal | None:
    """Return a refusal unless a function is one of the named kernels."""
    found = kernel_name(func)
    if found in names:
        return None
    kernels = f"kernel{'s' if len(names) > 1 else ''} {' and '.join(map(repr, names))}"
    this = "a stock operator" if found is None else repr(found)
    return Refusal(f"schedules {kernels}; this is {this}")
