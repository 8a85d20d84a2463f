"""Compile what the checks run, with inputs and expected outputs in float64."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from dcnv3_tvm import compile_artifact, frontend, targets
from dcnv3_tvm.bench.gpu_cases import select_cases
from dcnv3_tvm.bench.gpu_compilation import compile_ahead
from dcnv3_tvm.compiler.compile_kernel import DCNV3, GRAD_OFFSET_MASK, GRAD_X, compile_kernel
from dcnv3_tvm.compiler.target_info import target_info
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.op.reference_gradient import dcnv3_gradients
from dcnv3_tvm.provenance import installed_version
from dcnv3_tvm.runtime import kernel_runtime
from dcnv3_tvm.runtime.loading import read_metadata
from dcnv3_tvm.runtime.metadata import WEIGHTS
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.compare import reference_outputs
from dcnv3_tvm.verify.random_weights import randomize_
from dcnv3_tvm.verify.tolerances import gradient_bounds, operator_bound
from first_contact.contents import BENCH_PARTS, ENCODERS, Contents, Manifest, Operator

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers import prebuilt
from helpers.gradients import result_gradient
from helpers.operator import arguments
from helpers.specs import random_inputs
from helpers.toy import Toy

LIMIT: Final = 64 * 2**20
"""Bytes of the folder, above which some machines cannot be sent it."""

PACKED: Final = "dcnv3_packed"

# Odd sizes throughout; vector and scalar loads; every type.
_FLOAT32 = DCNv3Spec.of((2, 13, 11, 64), group=4, softmax=True)
_FLOAT16 = DCNv3Spec.of((1, 9, 14, 96), group=3, offset_scale=2.0, dtype="float16")
_BFLOAT16 = DCNv3Spec.of(
    (1, 8, 9, 48), group=4, kernel_size=(3, 5), stride=(2, 1), pad=(1, 0), dtype="bfloat16"
)
_SCALAR = DCNv3Spec.of((1, 7, 5, 15), group=3, softmax=True, dtype="float16")
OPERATORS: Final = (
    (DCNV3, _FLOAT32),
    (DCNV3, _FLOAT16),
    (DCNV3, _BFLOAT16),
    (DCNV3, _SCALAR),
    (PACKED, _FLOAT32),
    (PACKED, dataclasses.replace(_FLOAT16, softmax=True)),
    (GRAD_X, _FLOAT32),
    (GRAD_X, _FLOAT16),
    (GRAD_OFFSET_MASK, _FLOAT32),
    (GRAD_OFFSET_MASK, _FLOAT16),
)

_ENCODER, _ENCODER_SHAPE, _DTYPE = "test_internimage_pre_norm", (1, 3, 33, 45), "float16"
_IMAGES = 4


def prepare(
    root: Path,
    target: str,
    variants: Sequence[str] = (),
    batches: Sequence[int] = (1, 64),
    size: int = 224,
    bench: str = "",
    on_step: Callable[[str], None] = print,
) -> int:
    """Fill an empty folder and return its size in bytes.

    Parameters
    ----------
    root : Path
        The folder.
    target : str
        The GPU, for example ``"cuda-sm90"``.
    variants : sequence of str
        Large encoders.
    batches : sequence of int
        Their batch sizes.
    size : int
        Height and width of their images.
    bench : str
        Pattern of the operators of ``bench gpu`` that are measured.
    on_step : callable
        Called with a description of each step before it runs.
    """
    contents = Contents(root)
    kernel_runtime.copy_runtime(contents.libraries)
    about = target_info(targets.resolve_gpu(target))
    needed = f"apache-tvm-ffi=={installed_version('apache-tvm-ffi')}\n"
    (root / "requirements.txt").write_text(needed, encoding="utf-8")
    on_step("toy model")
    _toy(contents, about.arch)
    operators = []
    for kind, spec in OPERATORS:
        operator = _operator(contents, kind, spec, target)
        on_step(operator.name)
        operators.append(operator)
    on_step("the operators of tests/runtime/test_gpu.py")
    for spec in prebuilt.operators():
        _compile(contents, DCNV3, spec, target)
    on_step(f"{_ENCODER} without and with a CUDA graph")
    _encoder(contents, target)
    models = {}
    for variant in variants:
        for batch in batches:
            on_step(f"{variant}, batch {batch}")
            name = f"{variant}-n{batch}"
            models[name] = _model(contents, name, variant, batch, size, target)
    groups, _ = select_cases(BENCH_PARTS, bench)
    done = compile_ahead(groups, [], artifacts=contents.bench, target=target, on_step=on_step)
    if not done.ok:
        raise RuntimeError(f"bench gpu: {done.failed}")
    contents.write_manifest(Manifest(about, tuple(operators), models, bench))
    contents.pack()
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def _toy(contents: Contents, arch: str) -> None:
    toy = Toy.build(1, arch=arch)
    toy.write(contents.toy)
    images = np.random.default_rng(1).standard_normal((_IMAGES, 1, 3, 8, 8)).astype(np.float32)
    logits = np.stack([toy.main(image) for image in images])
    contents.save("toy", images=images, logits=logits)
    contents.save("toy-weights", **toy.weights)


def _operator(contents: Contents, kind: str, spec: DCNv3Spec, target: str) -> Operator:
    name = _compile(contents, kind, spec, target)
    inputs, seed = random_inputs(spec, seed=3), 9
    forward = inputs.x, inputs.offset, inputs.mask
    grad = result_gradient(spec, inputs, seed)
    outputs = (spec.dtype,)
    if kind in (DCNV3, PACKED):
        given = arguments(spec, inputs, packed=kind == PACKED)
        expected = [dcnv3_reference(*forward, spec)]
        bounds = [operator_bound(spec, *forward, expected[0])]
    else:
        gradients = dcnv3_gradients(grad, *forward, spec)
        limits = gradient_bounds(spec, grad, *forward, gradients)
        part = slice(0, 1) if kind == GRAD_X else slice(1, 3)
        expected, bounds = list(gradients[part]), list(limits[part])
        given = [grad, *forward[1:]] if kind == GRAD_X else [*forward, grad]
        outputs = (spec.accumulate_dtype,) if kind == GRAD_X else (spec.dtype,) * 2
    contents.save(
        name,
        **{f"input{index}": array for index, array in enumerate(given)},
        **{f"expected{index}": array for index, array in enumerate(expected)},
        **{f"bound{index}": array for index, array in enumerate(bounds)},
    )
    return Operator(name, kind, (spec.dtype,) * len(given), outputs)


def _compile(contents: Contents, kind: str, spec: DCNv3Spec, target: str) -> str:
    """Compile a kernel; return its name."""
    name = spec.slug.replace("dcnv3", kind, 1)
    kernel = compile_kernel(kind, spec, targets.target_text(target), "default")
    path = contents.code(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(kernel.library.code)
    return name


def _encoder(contents: Contents, target: str) -> None:
    model = randomize_(frontend.create_model(_ENCODER), seed=1)
    imported = frontend.import_model(model, example=_ENCODER_SHAPE)
    for name in ENCODERS:
        graph = name.endswith("graph")
        path = contents.root / name
        compile_artifact(imported, path, target=target, dtype=_DTYPE, cuda_graph=graph)
    shape = (_IMAGES, *_ENCODER_SHAPE)
    images = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    contents.save("encoder", images=images, **_reference(model, images[0]))


def _reference(model: InternImage, image: np.ndarray) -> dict[str, np.ndarray]:
    return {
        f"{entry}{index}": output
        for entry, outputs in reference_outputs(model, image).items()
        for index, output in enumerate(outputs)
    }


def _model(contents: Contents, name: str, variant: str, batch: int, size: int, target: str) -> str:
    """Compile a large encoder for a batch in which a few images repeat; return its weights' digest.

    Matrices hold one magnitude each and random signs, so that they compress to a fraction. The
    magnitude is exact in 16-bit types: otherwise its rounding would scale whole outputs. Weights
    cannot be made from a seed where they are needed: the compiler rewrites them.
    """
    model = randomize_(frontend.create_model(variant), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                magnitude = parameter.square().mean().sqrt().bfloat16()
                parameter.copy_(parameter.sign() * magnitude)
    shape = (min(batch, _IMAGES), 3, size, size)
    images = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    imported = frontend.import_model(model, example=(batch, 3, size, size))
    path = contents.model(name)
    compile_artifact(imported, path, target=target, dtype=_DTYPE)
    # Rounding the reference to float32 is nothing next to the tolerance of 16-bit types.
    reference = _reference(model, images)
    rounded = {key: output.astype(np.float32) for key, output in reference.items()}
    contents.save(name, images=images, **rounded)
    return read_metadata(path).digests[WEIGHTS]
