"""Check the arguments of a compiled operator against its specification."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dcnv3_tvm.dtypes import DTYPE_BYTES
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


def check_out(spec: DCNv3Spec, out: object, inputs: Sequence[object], alignment: int) -> None:
    """Check a tensor for the result against inputs that passed `check_tensors` and `check_shapes`.

    Parameters
    ----------
    spec : DCNv3Spec
        A static specification.
    out : object
        What the caller passed.
    inputs : sequence of object
        The tensors x, offset and mask.
    alignment : int
        As for `dcnv3_tvm.runtime.tensors.to_kernel`.

    Raises
    ------
    InvalidArgumentError
        If it is not a tensor of the kind and device of x, has another dtype or shape than the
        result, cannot be written as it is, or shares memory with an input.
    """
    x = inputs[0]
    for what, got, wanted in (
        ("is of another kind than x", tensors.kind_of("out", out), tensors.kind_of("x", x)),
        ("is on another device than x", tensors.device_of(out), tensors.device_of(x)),
        ("has another dtype than x", tensors.dtype_of(out), tensors.dtype_of(x)),
        ("has the wrong shape", tensors.shape_of(out), spec.output_shape),
    ):
        if got != wanted:
            raise InvalidArgumentError(f"out {what}", got=got, allowed=wanted)
    if tensors.needs_copy(out, alignment) or getattr(out, "requires_grad", False):
        raise InvalidArgumentError(
            "out cannot be written",
            allowed="a contiguous and writable tensor in native byte order that requires no "
            f"gradient, at a multiple of {alignment} bytes",
        )
    # The others are copied before out is written.
    shared = [tensors.to_kernel(each) for each in inputs if not tensors.needs_copy(each, alignment)]
    if tensors.overlap(tensors.to_kernel(out), shared, DTYPE_BYTES[spec.dtype]):
        raise InvalidArgumentError(
            "out shares memory with x, offset or mask",
            hint="The result cannot replace an input: allocate another tensor.",
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
