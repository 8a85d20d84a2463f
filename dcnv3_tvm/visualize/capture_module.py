"""Run a PyTorch model on an image, and keep the arguments of its DCNv3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dcnv3_tvm.forks import one_at_a_time
from dcnv3_tvm.frontend.torch.import_arguments import check_weights, unwrap
from dcnv3_tvm.frontend.torch.prepare_model import prepare_model
from dcnv3_tvm.frontend.torch.regions import without_autocast
from dcnv3_tvm.frontend.torch.replace_sampling import SamplingReplacement
from dcnv3_tvm.spec import DCNv3Params
from dcnv3_tvm.visualize.block_sampling import SampledBlock


@one_at_a_time  # Exchanges the code of published functions for a while.
def from_module(module: nn.Module, image: npt.NDArray[Any]) -> list[SampledBlock]:
    """Run a PyTorch model in inference mode; return the offset and mask of each of its DCNv3.

    Modules and functions that compute DCNv3 call this library's operator, as in an import.

    Raises
    ------
    InvalidArgumentError
        If it is not a PyTorch model.
    ModelImportError
        If it cannot be copied, or has no weights.
    """
    module = unwrap(module)
    check_weights(module)
    device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
    recorder = _Recorder()
    with without_autocast(), torch.no_grad(), SamplingReplacement() as sampling:
        model = prepare_model(module, sampling).model
        with recorder:
            model(torch.from_numpy(image).to(device))
    return recorder.blocks


class _Recorder(TorchFunctionMode):
    """Context that keeps the arguments of every call of ``torch.ops.dcnv3_tvm.dcnv3``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[SampledBlock] = []

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        params = kwargs or {}
        if func in (torch.ops.dcnv3_tvm.dcnv3, torch.ops.dcnv3_tvm.dcnv3.default):
            x, offset, mask = args
            size = (int(x.shape[1]), int(x.shape[2]))
            arrays = (each.detach().float().cpu().numpy() for each in (offset, mask))
            self.blocks.append(SampledBlock(DCNv3Params(**params), size, *arrays))
        return func(*args, **params)
