"""Check the arguments of a compiled operator against its specification."""

from __future__ import annotations

import dataclasses

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.spec import DCNv3Spec

_NHWC_HINT = "NHWC is expected: an NCHW tensor needs x.permute(0, 2, 3, 1).contiguous()."


def check_tensors(x: object, offset: object, mask: object) -> str:
    """Check that the arguments are tensors of one kind on one device, and return the device.

    Raises
    ------
    InvalidArgumentError
        If one is not a tensor, or they differ in kind or device.
    """
    arguments = {"x": x, "offset": offset, "mask": mask}
    kinds = {name: tensors.kind_of(name, tensor) for name, tensor in arguments.items()}
    devices = {name: tensors.device_of(tensor) for name, tensor in arguments.items()}
    for found, problem in (
        (kinds, "the tensors are of different kinds"),
        (devices, "the tensors are on different devices"),
    ):
        if len(set(found.values())) > 1:
            raise InvalidArgumentError(
                problem,
                got=", ".join(f"{name}: {value}" for name, value in found.items()),
                allowed="the same for all",
            )
    return devices["x"]


def check_shapes(spec: DCNv3Spec, x: object, offset: object, mask: object) -> None:
    """Check dtypes and shapes of the arguments against a static specification.

    Raises
    ------
    InvalidArgumentError
        If a tensor does not have the specified dtype or shape.
    """
    expected = {"x": spec.input_shape, "offset": spec.offset_shape, "mask": spec.mask_shape}
    got = {}
    for name, tensor in zip(expected, (x, offset, mask), strict=True):
        dtype = tensors.dtype_of(tensor)
        if dtype != spec.dtype:
            raise InvalidArgumentError(
                f"{name} has another dtype than {'the operator' if name == 'x' else 'x'}",
                got=dtype,
                allowed=spec.dtype,
            )
        got[name] = tensors.shape_of(tensor)
    for name, shape in expected.items():
        if len(got[name]) != 4:
            raise InvalidArgumentError(
                f"{name} does not have four dimensions",
                got=f"shape {got[name]}",
                allowed=f"shape {shape}",
            )
    for name, shape in expected.items():
        if got[name] != shape:
            raise InvalidArgumentError(
                f"{name} has the wrong shape",
                got=f"shape {got[name]}",
                allowed=f"shape {shape}, for x of shape {got['x']}, group={spec.group}, "
                f"{spec.points} points",
                hint=_layout_hint(spec, got, name, shape),
            )


def _layout_hint(
    spec: DCNv3Spec,
    got: dict[str, tuple[int, ...]],
    name: str,
    shape: tuple[int | None, ...],
) -> str | None:
    """Return a hint if a tensor seems to be NCHW."""
    batch, height, width, channels = shape
    if got[name] == (batch, channels, height, width):
        return _NHWC_HINT.replace("x.", f"{name}.")
    # Offset and mask may have the right shape for an x that is NCHW.
    n, c, h, w = got["x"]
    if c % spec.group == 0:
        try:
            permuted = dataclasses.replace(
                spec, batch=n, height=h, width=w, group_channels=c // spec.group
            )
        except InvalidArgumentError:
            return None
        if got[name] == (permuted.offset_shape if name == "offset" else permuted.mask_shape):
            return _NHWC_HINT
    return None
