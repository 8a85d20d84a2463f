"""Extents of a DCNv3 problem as TensorIR expressions."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from tvm import tirx
from tvm.sym import Analyzer

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.spec import DCNv3Spec

MAX_SIDE: Final = 2**24
"""Largest height and width: float32 represents all integers up to here, so borders are exact."""


class Sizes(NamedTuple):
    """Extents as int64 expressions: constants, or variables where the problem is dynamic."""

    batch: Any
    height: Any
    width: Any
    out_height: Any
    out_width: Any

    @classmethod
    def of(cls, spec: DCNv3Spec) -> Sizes:
        """Return the extents of a problem, with a new variable for each dynamic one.

        Raises
        ------
        InvalidArgumentError
            If height or width exceeds `MAX_SIDE`.
        """
        given = {"n": spec.batch, "height": spec.height, "width": spec.width}
        for name in ("height", "width"):
            if (given[name] or 0) > MAX_SIDE:
                raise InvalidArgumentError(
                    f"the {name} is too large", got=given[name], allowed=f"at most {MAX_SIDE}"
                )
        batch, height, width = (
            tirx.Var(name, "int64") if size is None else int64(size) for name, size in given.items()
        )
        analyzer = Analyzer()
        output = (
            analyzer.simplify(int64(spec.output_extent(size, axis)))
            for axis, size in enumerate((height, width))
        )
        return cls(batch, height, width, *output)

    def input_shape(self, channels: int) -> tuple[Any, ...]:
        """Return the shape of a tensor of the size of x."""
        return self.batch, self.height, self.width, channels

    def output_shape(self, channels: int) -> tuple[Any, ...]:
        """Return the shape of a tensor of the size of the result."""
        return self.batch, self.out_height, self.out_width, channels
