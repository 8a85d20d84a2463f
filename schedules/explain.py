"""Which rule takes a kernel, why, and what the others said."""

from __future__ import annotations

import dataclasses
import inspect

from tvm import tirx
from tvm.s_tir.schedule import ScheduleError
from tvm.target import Target

from dcnv3_tvm.schedules import rules_for
from dcnv3_tvm.schedules.gpu.threads import launches
from dcnv3_tvm.schedules.space import SearchSpace


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one rule.

    Parameters
    ----------
    rule : str
        Its name.
    taken : bool
        Whether it schedules the kernel.
    reason : str
        Why, or why not.
    """

    rule: str
    taken: bool
    reason: str


def explain(func: tirx.PrimFunc, target: Target) -> tuple[list[Verdict], tirx.PrimFunc | None]:
    """Ask every rule for a target what it makes of a kernel.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Unscheduled.
    target : tvm.target.Target
        The target.

    Returns
    -------
    verdicts : list of Verdict
        In the order in which rules are tried.
    scheduled : tvm.tirx.PrimFunc or None
        What the rule that takes it made of it; None if none does.
    """
    verdicts = []
    scheduled = None
    for rule in rules_for(target):
        name = rule.__name__
        if scheduled is not None:
            verdicts.append(Verdict(name, False, "not asked: a rule before it takes the kernel"))
            continue
        try:
            scheduled = rule(func, target, SearchSpace())
        except ScheduleError as error:
            text = str(error).strip().splitlines()[-1]
            verdicts.append(Verdict(name, False, f"a step of the schedule fails: {text}"))
            continue
        if scheduled is None:
            verdicts.append(Verdict(name, False, "it schedules other kernels"))
        else:
            verdicts.append(Verdict(name, True, _summary(rule)))
    return verdicts, scheduled


def launch(scheduled: tirx.PrimFunc) -> str:
    """Describe how a function scheduled for a GPU is started: blocks and threads of each kernel."""
    return ", then ".join(map(_shape, launches(scheduled))) or "no kernel"


def _shape(block: dict[str, str]) -> str:
    def extents(kind: str) -> str:
        found = [block[axis] for axis in sorted(block) if axis.startswith(kind)]
        return " x ".join(f"({size})" if " " in size else size for size in found) or "1"

    return f"{extents('block')} blocks of {extents('thread')} threads"


def _summary(rule: object) -> str:
    """Return the first paragraph of a rule's description behind its title, on one line."""
    paragraphs = (inspect.getdoc(rule) or "").split("\n\n")
    chosen = paragraphs[1] if len(paragraphs) > 1 else paragraphs[0]
    if chosen.startswith("Parameters\n"):
        chosen = paragraphs[0]
    return " ".join(chosen.split())
