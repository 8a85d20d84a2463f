"""Short names of DCNv3 problems, such as ``dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f16``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dcnv3_tvm.errors import InvalidArgumentError

_DTYPES: Final = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PAIRS: Final = {"kernel_size": "k", "stride": "s", "pad": "p", "dilation": "d"}
_SLUG: Final = re.compile(
    r"dcnv3-n(?P<n>\d+|any)-h(?P<h>\d+|any)-w(?P<w>\d+|any)-c(?P<c>\d+)-g(?P<g>\d+)"
    r"-k(?P<k>\d+(?:x\d+)?)-s(?P<s>\d+(?:x\d+)?)-p(?P<p>\d+(?:x\d+)?)-d(?P<d>\d+(?:x\d+)?)"
    r"(?:-o(?P<o>[-+.\de]+?))?(?P<rc>-rc)?(?P<softmax>-softmax)?-(?P<dtype>f64|f32|f16|bf16)"
)


def format_slug(shape: Sequence[int | None], params: Mapping[str, Any], dtype: str) -> str:
    """Return the slug of a problem.

    Parameters
    ----------
    shape : sequence of int or None
        Shape of x, (N, H, W, C); None where dynamic.
    params : mapping
        The parameters of the operator by name.
    dtype : str
        Element type.
    """
    *sizes, channels = shape
    parts = ["dcnv3"]
    parts += [f"{c}{'any' if s is None else s}" for c, s in zip("nhw", sizes, strict=True)]
    parts += [f"c{channels}", f"g{params['group']}"]
    parts += [letter + _extents(params[name]) for name, letter in _PAIRS.items()]
    if params["offset_scale"] != 1.0:
        parts.append(f"o{params['offset_scale']:g}")
    if params["remove_center"]:
        parts.append("rc")
    if params["softmax"]:
        parts.append("softmax")
    return "-".join([*parts, _DTYPES[dtype]])


def _extents(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"


def parse_slug(slug: Any) -> tuple[tuple[int | None, ...], dict[str, Any], str]:
    """Return shape, parameters and dtype of a problem as `format_slug` takes them.

    Raises
    ------
    InvalidArgumentError
        If it is not a slug.
    """
    match = _SLUG.fullmatch(slug) if isinstance(slug, str) else None
    if match is None:
        raise InvalidArgumentError(
            "the name of the operator is not a slug",
            got=repr(slug),
            allowed="a slug such as dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f32",
        )

    def extents(letter: str) -> tuple[int, int]:
        first, _, second = match[letter].partition("x")
        return int(first), int(second or first)

    sizes = tuple(None if match[size] == "any" else int(match[size]) for size in "nhw")
    params = {name: extents(letter) for name, letter in _PAIRS.items()} | {
        "group": int(match["g"]),
        "offset_scale": float(match["o"] or 1.0),
        "remove_center": bool(match["rc"]),
        "softmax": bool(match["softmax"]),
    }
    (dtype,) = (name for name, short in _DTYPES.items() if short == match["dtype"])
    return (*sizes, int(match["c"])), params, dtype
