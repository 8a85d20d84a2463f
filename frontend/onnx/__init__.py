"""Import ONNX files that contain DCNv3 in any of its forms, and export PyTorch models to them."""

from typing import Final, Literal, get_args

FormName = Literal["deform-conv", "grid-sample", "plugin", "custom"]

FORMS: Final[tuple[FormName, ...]] = get_args(FormName)
"""Forms in which DCNv3 is exported, the default first."""
