"""What PyTorch's idle threads cost a compiled model that is called in the same process."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

from dcnv3_tvm.bench.alone import PRODUCT_SIZE, AloneError
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.contestants import OURS
from dcnv3_tvm.bench.deployed import Deployed
from dcnv3_tvm.bench.listing import Listing
from dcnv3_tvm.bench.measure import Plan, Quartiles, Timing
from dcnv3_tvm.bench.provenance import Provenance

SETTINGS: Final[tuple[dict[str, str], ...]] = (
    {},
    {"GOMP_SPINCOUNT": "10000"},
    {"GOMP_SPINCOUNT": "0"},
    {"OMP_WAIT_POLICY": "PASSIVE"},
    {"TVM_BIND_THREADS": "0"},
)
"""Environment variables of the processes, beginning with none."""


@dataclasses.dataclass(frozen=True)
class BesideRow:
    """One setting; times in seconds, medians.

    Parameters
    ----------
    setting : str
        Environment variables.
    alone, beside : float
        Of a call of the model among its like, and of one behind a matrix product of PyTorch.
    speed, lowest_speed : float
        ``alone / beside``, of bursts of the same round: the median and the least.
    product_alone, product_beside : float
        Of PyTorch's product among its like, and of one behind a call of the model.
    """

    setting: str
    alone: float
    beside: float
    speed: float
    lowest_speed: float
    product_alone: float
    product_beside: float

    @classmethod
    def of(cls, setting: str, bursts: dict[str, Any]) -> BesideRow:
        """Summarise what `dcnv3_tvm.bench.alone.beside_torch` gave."""
        timings = {name: Timing(tuple(map(tuple, found))) for name, found in bursts.items()}
        speeds: Quartiles = timings["alone"].ratio_to(timings["beside"])
        medians = {name: timing.seconds.median for name, timing in timings.items()}
        return cls(setting, speed=speeds.median, lowest_speed=speeds.best, **medians)


@dataclasses.dataclass(frozen=True)
class BesideListing(Listing[BesideRow]):
    """All settings."""

    KIND: ClassVar[str] = "beside-torch"
    HEADER: ClassVar[tuple[str, ...]] = (
        "setting",
        "alone, ms",
        "behind PyTorch",
        "speed",
        "least",
        "PyTorch alone, ms",
        "behind a call",
    )

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of a table for people, under `HEADER`."""

        def times(*seconds: float) -> list[str]:
            return [f"{1e3 * value:9.3f}" for value in seconds]

        return [
            (
                row.setting,
                *times(row.alone, row.beside),
                f"{100 * row.speed:4.0f}%",
                f"{100 * row.lowest_speed:4.0f}%",
                *times(row.product_alone, row.product_beside),
            )
            for row in self.rows
        ]


def measure_beside_torch(
    case: EncoderCase,
    *,
    threads: int,
    rounds: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> BesideListing:
    """Time a compiled model alone and behind operations of PyTorch, a fresh process a setting.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    threads : int
        Of the model and of PyTorch.
    rounds : int
        Bursts of each.
    on_step : callable
        Called with what happens next.

    Raises
    ------
    AloneError
        If a process fails, or its model's outputs are wrong.
    """
    plan = dataclasses.asdict(Plan(rounds=rounds))
    none = dict.fromkeys((name for setting in SETTINGS for name in setting), "")
    rows = []
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-bench-") as folder:
        on_step(f"{case.slug}: inputs and reference")
        deployed = Deployed(case, Path(folder), threads)
        for setting in SETTINGS:
            text = " ".join(f"{name}={value}" for name, value in setting.items()) or "defaults"
            on_step(f"{case.slug}: {text}")
            bursts, error = deployed.run(
                "beside_torch", OURS, environment=none | setting, plan=plan
            )
            if not error <= deployed.problem.tolerance:
                raise AloneError(
                    f"the outputs are wrong with {text}",
                    got=f"an error of {error:.1e}",
                    allowed=f"{deployed.problem.tolerance:.1e}",
                )
            rows.append(BesideRow.of(text, bursts))
    return BesideListing(
        slug=case.slug,
        provenance=Provenance.here(threads),
        how=f"Calls of a model, in turns alone and each behind a product of two {PRODUCT_SIZE}x"
        f"{PRODUCT_SIZE} matrices by PyTorch with {threads} threads, which is not timed; speed is "
        "the first time over the second.",
        rows=tuple(rows),
    )
