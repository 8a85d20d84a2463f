"""Encoders in float32 without LLVM's optimisations, compared as in `test_encoders`."""

import pytest

import dcnv3_tvm as dt
from dcnv3_tvm import frontend
from dcnv3_tvm.verify.compare import compare
from dcnv3_tvm.verify.random_weights import randomize_
from helpers.encoders import random_encoder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unoptimized")]


def assert_agrees(compiled, model, image, outputs=1 + 4, reference=None):
    differences = compare(compiled, model, image, reference)
    assert len(differences) == outputs
    assert [d for d in differences if not d.within("float32")] == []
    assert all(d.scale > 1e-2 for d in differences)


@pytest.mark.parametrize("name", frontend.list_models("test_internimage_*"))
def test_every_block_path_and_head(name):
    model, imported, image, reference = random_encoder(name, (2, 3, 64, 96))
    compiled = dt.compile_model(imported)
    assert "unscheduled" not in compiled.metadata.kernels.values()
    assert_agrees(compiled, model, image, reference=reference)


def test_dynamic_batch_and_multiples_of_32(rng):
    """This head adds maps of strides 16 and 32."""
    model = randomize_(frontend.create_model("test_internimage_post_norm"), seed=2)
    imported = frontend.import_model(
        model, example=(1, 3, 64, 32), dynamic_batch=True, dynamic_size=32, features="never"
    )
    compiled = dt.compile_model(imported)
    assert compiled.metadata.activation_bytes == {}
    for shape in ((1, 3, 64, 32), (3, 3, 32, 96)):
        assert_agrees(compiled, model, rng.standard_normal(shape).astype("float32"), outputs=1)


def test_dynamic_batch_and_size(rng):
    model = randomize_(frontend.create_model("test_internimage_post_norm_scale"), seed=3)
    imported = frontend.import_model(
        model, example=(1, 3, 64, 96), dynamic_batch=True, dynamic_size=True, features="never"
    )
    compiled = dt.compile_model(imported)
    for shape in ((1, 3, 64, 96), (2, 3, 75, 131), (1, 3, 33, 40)):
        assert_agrees(compiled, model, rng.standard_normal(shape).astype("float32"), outputs=1)
