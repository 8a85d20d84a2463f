"""Check the shape guards of an exported program: the conditions on sizes that it depends on.

A model may branch on the image size (``if height % 32: pad``). ``torch.export`` follows the branch
of the example and records the condition as a guard; the graph itself does not contain it.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.utils._sympy.printers import PythonPrinter

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.signature import BATCH, TensorInfo, parse_size

_FACTORS: Final = range(1, 257)
"""What sizes of images may have to be multiples of."""

_TESTED_SIZES: Final = (*range(2, 132), 256, 257, 384, 510, 513, 800, 1023, 1333, 4096, 5001)
"""Sizes for which guards are evaluated: all remainders of common strides, small and large."""

_NAMESPACE: Final = {
    each.__name__: each for each in (math, torch, min, max, abs, int, float, round)
}
"""Names that PyTorch uses in printed guards."""


class ShapeGuards:
    """The guards of an exported program: conditions on its dynamic sizes.

    Guards that exclude only a size of one are accepted: ``torch.export`` always adds them, and the
    operators left in the graph are valid for one as well.

    Parameters
    ----------
    program : ExportedProgram
        The program.
    infos : sequence of TensorInfo
        Its inputs.
    sizes : mapping of str to int
        Dynamic sizes of the examples by name, as in `ModelInputs.sizes`.
    """

    def __init__(
        self, program: ExportedProgram, infos: Sequence[TensorInfo], sizes: Mapping[str, int]
    ) -> None:
        names = [parse_size(size) for info in infos for size in info.shape if isinstance(size, str)]
        self._multiples = {name: multiple for multiple, name in names}
        self._example = {name: self._multiples[name] * size for name, size in sizes.items()}
        self._guards, self._bounds = _read(program, infos)

    def check(self) -> None:
        """Raise an error for a program that is valid only for some of the dynamic sizes.

        Raises
        ------
        ModelImportError
            If a guard fails for some size; the message names the guard and its source line.
        """
        if self._bounds:
            raise ModelImportError(
                "the exported model would not accept larger images",
                got=", ".join(f"{name} <= {most}" for name, most in self._bounds.items()),
                hint="Use an example whose smallest feature map has more than one pixel. If the "
                "model computes something else for larger images, import it with fixed sizes.",
            )
        if self._failing:
            failing = [
                f"{guard} ({source})" if source else guard
                for guard, source in self._guards.items()
                if guard in self._failing
            ]
            multiple = self.size_multiple()
            raise ModelImportError(
                "the model computes something else for images of another size",
                got=f"it was exported for sizes where {' and '.join(failing)}",
                hint="Import it with fixed sizes (dynamic_batch=False, dynamic_size=False), or "
                "move the step that depends on the size (for example a padding) out of the model."
                if multiple is None
                else f"Import it for multiples of {multiple}: dynamic_size={multiple}, or "
                f"--dynamic-size {multiple}; or with fixed sizes.",
            )

    def size_multiple(self) -> int | None:
        """Return the least m so that all guards hold for heights and widths that are multiples."""
        if self._bounds:
            return None
        for factor in _FACTORS:
            if all(self._failing_sizes(guard, factor) is None for guard in self._failing):
                return factor * max(self._multiples.values(), default=1)
        return None

    def failing_sizes(self) -> dict[str, int] | None:
        """Return dynamic sizes for which a guard does not hold, if there are any."""
        return next(iter(self._failing.values()), None)

    @functools.cached_property
    def _failing(self) -> dict[str, dict[str, int]]:
        """Guards that do not hold for some sizes, and such sizes."""
        sizes = {guard: self._failing_sizes(guard) for guard in self._guards}
        return {guard: failing for guard, failing in sizes.items() if failing is not None}

    def _failing_sizes(self, guard: str, factor: int = 1) -> dict[str, int] | None:
        tree = ast.parse(guard, mode="eval")
        code = compile(tree, guard, "eval")
        sizes: dict[str, int] = {}
        try:
            for sizes in self._tested_sizes(factor):
                if not (_evaluate(code, sizes) or _has_size_of_one(tree, sizes)):
                    return sizes
        except (NameError, AttributeError, TypeError, ArithmeticError):
            return sizes  # The guard depends on more than sizes.
        return None

    def _tested_sizes(self, factor: int) -> Iterator[dict[str, int]]:
        """Yield the example's sizes with one dynamic size changed at a time."""
        steps = {
            name: known * (1 if name == BATCH else factor)
            for name, known in self._multiples.items()
        }
        example = {
            name: math.ceil(size / steps[name]) * steps[name]
            for name, size in self._example.items()
        }
        for name, step in steps.items():
            for size in _TESTED_SIZES:
                yield example | {name: size * step}


def _read(
    program: ExportedProgram, infos: Sequence[TensorInfo]
) -> tuple[dict[str, str], dict[str, int]]:
    """Return the guards as Python expressions with their source lines, and the upper bounds."""
    print_python = PythonPrinter().doprint
    sizes = list(_named_sizes(program, infos))
    names: dict[str, str] = {}
    guards: dict[str, str] = {}
    for name, size in sizes:
        symbol = print_python(size.node.expr)
        if symbol.isidentifier() and symbol not in names:
            names[symbol] = name
        else:  # torch.export concluded that one size depends on another.
            guards[f"{name} == {symbol}"] = ""
    for _, size in sizes[:1]:  # All sizes share one list of guards.
        environment = size.node.shape_env
        for guard in environment.guards:
            # Sizes found to be equal are one symbol in the shapes of the inputs.
            expression = print_python(environment.replace(guard.expr))
            guards[expression] = str(guard.sloc).strip("()")

    def renamed(text: str) -> str:
        return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), text)

    bounds = {
        renamed(print_python(symbol)): int(values.upper)
        for symbol, values in program.range_constraints.items()
        if not math.isinf(float(values.upper))
    }
    return {renamed(guard): source for guard, source in guards.items()}, bounds


def _named_sizes(
    program: ExportedProgram, infos: Sequence[TensorInfo]
) -> Iterator[tuple[str, torch.SymInt]]:
    """Yield the dynamic sizes of the inputs, with an expression of the sizes in the signature."""
    inputs = set(program.graph_signature.user_inputs)
    tensors = [node.meta["val"] for node in program.graph.nodes if node.name in inputs]
    for tensor, info in zip(tensors, infos, strict=True):
        named = (size for size in info.shape if isinstance(size, str))
        for size in tensor.shape:
            if isinstance(size, torch.SymInt):
                multiple, name = parse_size(next(named))
                yield (name if multiple == 1 else f"({name} // {multiple})"), size


def _evaluate(code: Any, sizes: Mapping[str, int]) -> Any:
    return eval(code, {"__builtins__": {}, **_NAMESPACE, **sizes})


def _has_size_of_one(tree: ast.Expression, sizes: Mapping[str, int]) -> bool:
    """Whether a computed size in a guard is one (or zero), for example that of a feature map."""
    for node in ast.walk(tree):
        # A remainder or a ratio is not a size.
        if not isinstance(node, ast.BinOp) or isinstance(node.op, (ast.Mod, ast.Div)):
            continue
        depends = any(isinstance(part, ast.Name) for part in ast.walk(node))
        if depends and _evaluate(compile(ast.Expression(node), "", "eval"), sizes) in (0, 1):
            return True
    return False
