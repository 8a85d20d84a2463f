"""Inspect and run imported models, for tests of the importer."""

import copy

import numpy as np
import torch
import tvm
from tvm import relax

from dcnv3_tvm.op import relax_op
from dcnv3_tvm.verify.tolerances import MODEL
from helpers.relax_vm import compile_relax


def dcnv3_calls(imported, entry="main"):
    """List the calls of the operator in an entry."""
    found = []
    relax.analysis.post_order_visit(
        imported.module[entry], lambda e: found.append(e) if relax_op.is_dcnv3(e) else None
    )
    return found


def count_dcnv3(imported, entry="main"):
    """Count the calls of the operator in an entry."""
    return len(dcnv3_calls(imported, entry))


def random_image(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_imported(imported, *images, entry="main"):
    """Compile one entry and return its outputs for each image."""
    function = imported.module[entry]
    machine = compile_relax(tvm.IRModule({entry: function}))
    weights = [tvm.runtime.tensor(imported.weights[w]) for w in imported.entries[entry].weights]
    return [
        [np.asarray(output.numpy()) for output in machine[entry](_tensor(image), *weights)]
        for image in images
    ]


def run_pytorch(model, image):
    """Run a copy of a model in inference mode; its sampling uses grid_sample."""
    model = copy.deepcopy(model)
    for part in model.modules():
        part.training = False
    with torch.no_grad():
        return model(image)


def assert_close(outputs, expected):
    assert len(outputs) == len(expected)
    for output, tensor in zip(outputs, expected, strict=True):
        reference = tensor.detach().numpy()
        assert output.shape == reference.shape
        assert np.abs(output - reference).max() <= MODEL["float32"] * np.abs(reference).max()


def _tensor(image):
    return tvm.runtime.tensor(image.numpy())
