"""Which schedule an operator gets, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dcnv3_tvm import targets
from dcnv3_tvm.spec import DCNv3Spec

if TYPE_CHECKING:
    from tvm.target import Target

    from dcnv3_tvm.schedules.explain import Verdict


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; ``print`` shows it.

    Parameters
    ----------
    problem, target : str
        Short names.
    verdicts : tuple of Verdict
        What became of each rule, in the order in which they are tried.
    launch : str
        Blocks and threads on a GPU; empty for a CPU.
    """

    problem: str
    target: str
    verdicts: tuple[Verdict, ...]
    launch: str

    @property
    def rule(self) -> str | None:
        """Name of the rule that is used."""
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
    """Say which schedule rule the operator gets for a problem, and why the others do not apply.

    Nothing is compiled, and a GPU is not needed.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem.
    target : str, mapping or tvm.target.Target
        As for `dcnv3_tvm.targets.resolve_target`.

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
    from dcnv3_tvm.op.tensorir import dcnv3
    from dcnv3_tvm.schedules import explain as schedules

    resolved = targets.resolve_target(target)
    verdicts, scheduled = schedules.explain(dcnv3(spec), resolved)
    on_gpu = targets.is_gpu(resolved) and scheduled is not None
    return Explanation(
        problem=spec.slug,
        target=targets.target_slug(resolved),
        verdicts=tuple(verdicts),
        launch=schedules.launch(scheduled) if on_gpu else "",
    )
