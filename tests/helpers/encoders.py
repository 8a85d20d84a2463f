"""Encoders with random weights, and their outputs in float64."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcnv3_tvm import frontend, runtime
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.verify.compare import reference_outputs
from dcnv3_tvm.verify.random_weights import randomize_


class Encoder(NamedTuple):
    """An encoder, its import, an input, and the outputs of the reference implementation."""

    model: InternImage
    imported: ImportedModel
    image: np.ndarray
    reference: dict[str, list[np.ndarray]]


@functools.lru_cache(maxsize=2)
def random_encoder(
    name: str, shape: tuple[int, int, int, int], depths: tuple[int, ...] | None = None
) -> Encoder:
    """Build a variant with random weights, and run the reference on a random image.

    Parameters
    ----------
    name : str
        The variant.
    shape : tuple of int
        Static NCHW shape of the image.
    depths : tuple of int, optional
        Blocks of each stage. Fewer than the variant has give the same kernels in less time.
    """
    config = model_config(name)
    if depths is not None:
        config = dataclasses.replace(config, depths=depths)
    model = randomize_(InternImage(config).eval().requires_grad_(False), seed=1)
    image = np.random.default_rng(20260801).standard_normal(shape).astype("float32")
    imported = frontend.import_model(model, example=shape)
    return Encoder(model, imported, image, reference_outputs(model, image))


def gpu_launches(path: Path, image: np.ndarray) -> dict[str, list[str]]:
    """Run each entry of an artifact twice on the emulated GPU; return what the second call logs.

    Call it in the process that has the GPU. The result holds ``"launch"`` for a kernel and
    ``"graph"`` for a CUDA graph, by entry.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    driver.fake_log.restype = ctypes.c_char_p
    launches = {}
    with runtime.load(path) as model:
        for name, call in (("main", model), ("features", model.features)):
            call(image)
            driver.fake_clear()
            call(image)
            kinds = [line.split()[0] for line in driver.fake_log().decode().splitlines()]
            launches[name] = [kind for kind in kinds if kind in ("launch", "graph")]
    return launches


def gpu_memory(path: Path, images: list[np.ndarray]) -> int:
    """Call an artifact on the emulated GPU with some images; return the bytes it then holds there.

    Call it in the process that has the GPU.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    driver.fake_used.restype = ctypes.c_size_t
    with runtime.load(path) as model:
        for image in images:
            model(image)
        return int(driver.fake_used())
