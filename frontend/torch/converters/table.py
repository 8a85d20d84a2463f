"""The converters by name of the PyTorch operator; they take precedence over TVM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.converters.attention import ATTENTION
from dcnv3_tvm.frontend.torch.converters.data_movement import DATA_MOVEMENT
from dcnv3_tvm.frontend.torch.converters.elementwise import ELEMENTWISE
from dcnv3_tvm.frontend.torch.converters.indexing import INDEXING
from dcnv3_tvm.frontend.torch.converters.normalization import NORMALIZATION
from dcnv3_tvm.frontend.torch.converters.reductions import REDUCTIONS
from dcnv3_tvm.frontend.torch.converters.resize import RESIZE
from dcnv3_tvm.frontend.torch.converters.sampling import SAMPLING
from dcnv3_tvm.frontend.torch.converters.windows import WINDOWS

CONVERTERS: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    **ATTENTION,
    **DATA_MOVEMENT,
    **ELEMENTWISE,
    **INDEXING,
    **NORMALIZATION,
    **REDUCTIONS,
    **RESIZE,
    **SAMPLING,
    **WINDOWS,
}
"""Keys are operator and overload, for example ``"layer_norm.default"``."""
