"""Explain which schedule rule a kernel gets, and why the others do not apply."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dcnv3_tvm import targets
from dcnv3_tvm.spec import DCNv3Spec

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.target import Target

    from dcnv3_tvm.schedules import ScheduledKernel
    from dcnv3_tvm.schedules.rule import Rule


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a rule schedules a kernel.

    Parameters
    ----------
    rule : str
        Name of the rule.
    taken : bool
        Whether the rule schedules the kernel.
    reason : str
        What the rule does, or why it does not apply.
    """

    rule: str
    taken: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Result of `explain`; ``print`` shows it.

    Parameters
    ----------
    problem, target : str
        Slugs of the problem and the target.
    verdicts : tuple of Verdict
        One for each rule, in the order in which they are tried.
    launch : str
        Blocks and threads on a GPU; empty for a CPU.
    """

    problem: str
    target: str
    verdicts: tuple[Verdict, ...]
    launch: str

    @property
    def rule(self) -> str | None:
        """Name of the rule that schedules the kernel."""
        return next((verdict.rule for verdict in self.verdicts if verdict.taken), None)

    def __str__(self) -> str:
        lines = [
            f"{self.problem} for {self.target}",
            *(f"  {'*' if v.taken else ' '} {v.rule}: {v.reason}" for v in self.verdicts),
        ]
        if self.launch:
            lines.append(f"  launch: {self.launch}")
        return "\n".join(lines)


def explain(spec: DCNv3Spec, target: str | Mapping[str, Any] | Target = "auto") -> Explanation:
    """Explain which schedule rule the operator gets for a problem, without compiling it.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem.
    target : str, mapping or tvm.target.Target
        As for `dcnv3_tvm.targets.resolve_target`. A GPU need not be present.

    Returns
    -------
    Explanation

    Raises
    ------
    TargetError
        If the target is unknown.

    Examples
    --------
    >>> from dcnv3_tvm import DCNv3Spec
    >>> found = explain(DCNv3Spec.of((64, 56, 56, 64), group=4, dtype="float16"), "cuda-sm90")
    >>> found.rule, found.launch
    ('dcnv3', '6272 blocks of 2 x 64 threads')
    """
    from dcnv3_tvm import schedules
    from dcnv3_tvm.op.tensorir import dcnv3

    resolved = targets.resolve_target(target)
    kernel = schedules.apply_rules(dcnv3(spec, vector_loads=targets.is_gpu(resolved)), resolved)
    return Explanation(
        problem=spec.slug,
        target=targets.target_slug(resolved),
        verdicts=verdicts(kernel, resolved),
        launch=launch(kernel.function) if targets.is_gpu(resolved) else "",
    )


def verdicts(kernel: ScheduledKernel, target: Target) -> tuple[Verdict, ...]:
    """Return a verdict for each rule for a target, in the order in which they are tried."""
    from dcnv3_tvm import schedules

    def verdict(rule: Rule) -> Verdict:
        name = rule.__name__
        if name in kernel.refusals:
            return Verdict(name, False, kernel.refusals[name])
        if name == kernel.rule:
            return Verdict(name, True, _summary(rule))
        return Verdict(name, False, f"not tried: {kernel.rule} applies")

    return tuple(map(verdict, schedules.rules_for(target)))


def launch(scheduled: tirx.PrimFunc) -> str:
    """Describe the launch of a function scheduled for a GPU: blocks and threads of each kernel."""
    from dcnv3_tvm.schedules.gpu.launch import launches

    return ", then ".join(map(_shape, launches(scheduled))) or "no kernel"


def _shape(launch: Mapping[str, str]) -> str:
    def extents(kind: str) -> str:
        found = [launch[axis] for axis in sorted(launch) if axis.startswith(kind)]
        return " x ".join(f"({size})" if " " in size else size for size in found) or "1"

    return f"{extents('block')} blocks of {extents('thread')} threads"


def _summary(rule: Rule) -> str:
    """Return the second paragraph of a rule's docstring, its strategy, on one line."""
    paragraphs = (inspect.getdoc(rule) or "").split("\n\n")
    return " ".join(paragraphs[min(1, len(paragraphs) - 1)].split())
