"""Leave TVM's argument checks out of the kernels of a model."""

from __future__ import annotations

from typing import Final

UNCHECKED_KERNELS: Final = {"tirx.disable_assert": True}
"""Pass options without the checks of every kernel's arguments.

They are more code than the kernels themselves and take half of the time of LLVM. Inputs are checked
by `dcnv3_tvm.runtime` before a call, and tensors between kernels are allocated by the model."""
