"""Problems, their PyTorch reference implementation, and the backends that compute them."""

import dataclasses

import numpy as np
import pytest
import torch

from dcnv3_tvm import frontend
from dcnv3_tvm.bench import builders, training
from dcnv3_tvm.bench.accuracy import largest_error
from dcnv3_tvm.bench.backends import BF16_PEER_TOLERANCE, OURS, PEER_TOLERANCE, select_peers
from dcnv3_tvm.bench.cases import encoder_case
from dcnv3_tvm.bench.problems import encoder_problem, operator_problem
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.runtime.library import default_threads
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.compare import reference_outputs
from dcnv3_tvm.verify.pytorch_reference import PyTorchOperator, with_sampling
from dcnv3_tvm.verify.random_weights import randomize_
from helpers.specs import random_inputs

pytestmark = pytest.mark.usefixtures("unoptimized")

TINY = "test_internimage_pre_norm"


def outputs_of(backend):
    return backend.runner.outputs(backend.runner.call())


def build_all(problem, *peers, **options):
    """Build this library's backends and the named peers."""
    selected = select_peers(peers, problem.dtype, **options)
    made = builders.builders(problem, selected, default_threads())
    return {name: build() for name, build in made.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": (3, 5), "stride": (2, 1), "pad": (2, 1), "dilation": (1, 2)},
        {"remove_center": True, "offset_scale": 1.5},
        {"kernel_size": 2, "pad": 1, "offset_scale": 0.5},
    ],
)
def test_pytorch_operator_matches_the_reference(options):
    spec = DCNv3Spec.of((2, 7, 11, 12), group=3, dtype="float64", **options)
    inputs = random_inputs(spec)
    arrays = (inputs.x, inputs.offset, inputs.mask)
    found = PyTorchOperator(spec)(*map(torch.from_numpy, arrays)).numpy()
    np.testing.assert_allclose(found, dcnv3_reference(*arrays, spec), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", frontend.list_models("test_*"))
def test_encoder_with_grid_sampling_matches_the_reference(name):
    model = randomize_(frontend.create_model(name))
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 64))
    (reference,) = reference_outputs(model, image)["main"]
    module = with_sampling(model).double()
    with torch.no_grad():
        found = module(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(found, reference, rtol=0, atol=1e-9 * np.abs(reference).max())
    assert type(model.levels[0].blocks[0].dcn) is frontend.DCNv3


def test_operator_problem():
    spec = DCNv3Spec.of((1, 9, 5, 8), group=2)
    problem = operator_problem(spec)
    assert problem.slug == spec.slug
    offset = problem.inputs["offset"]
    assert 1.8 < np.abs(offset).max() <= 2.0
    assert all(array.dtype == np.float32 and array.any() for array in problem.inputs.values())
    assert problem.reference[0].dtype == np.float64
    assert (problem.flops, problem.bytes) == (spec.flops, spec.bytes)
    assert 1e-7 < problem.tolerance < 1e-4


def test_operator_problem_with_gradients():
    spec = DCNv3Spec.of((1, 9, 5, 8), group=2, offset_scale=1.5)
    problem = operator_problem(spec, backward=True)
    assert (problem.flops, problem.bytes) == (3 * spec.flops, spec.bytes + spec.gradient_bytes)
    assert 1e-7 < problem.tolerance < 1e-3
    made = build_all(problem, "torch", gradients=True)
    assert list(made) == [OURS, "torch"]
    for backend in made.values():
        outputs = outputs_of(backend)
        assert [output.shape for output in outputs] == [
            *(spec.output_shape, spec.input_shape, spec.offset_shape, spec.mask_shape)
        ]
        for index, reference in enumerate(problem.reference):
            assert largest_error(outputs, problem.reference, problem.measure) < 1e-5
            wrong = [*problem.reference]
            wrong[index] = 1.01 * reference
            assert largest_error(outputs, wrong, problem.measure) > PEER_TOLERANCE


def test_training_problem(monkeypatch):
    tasks = []
    monkeypatch.setattr(training, "run_worker", lambda task: tasks.append(task) or {"bytes": 5})
    problem = training.training_problem(encoder_case(TINY, batch=2, size=(32, 40)))
    assert problem.slug.endswith("-train")
    model = problem.own_modules[OURS]
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for backend in build_all(problem, "torch", gradients=True).values():
        assert backend.runner.peak_bytes == 5
        loss, grads = outputs_of(backend)
        assert (loss.shape, grads.shape) == ((1,), (1, before.numel()))
        error = largest_error([loss, grads], problem.reference, problem.measure)
        assert error <= 1e-3 < problem.tolerance  # Tiny models stay far from the bound.
        assert largest_error([loss, -grads], problem.reference, problem.measure) > 1
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    assert 0 < (after - before).abs().max() < 1e-2
    assert {task.training for task in tasks} == {"float32"}


def test_training_problem_in_bfloat16(monkeypatch):
    monkeypatch.setattr(training, "run_worker", lambda _: {"bytes": 5})
    problem = training.training_problem(
        encoder_case(TINY, batch=2, size=(32, 40), dtype="bfloat16")
    )
    outputs = outputs_of(build_all(problem, "torch", gradients=True)["torch"])
    error = largest_error(outputs, problem.reference, problem.measure)
    assert 1e-3 < error <= problem.tolerance == 0.3


def test_encoder_problem():
    problem = encoder_problem(encoder_case(TINY, size=(32, 40)))
    assert problem.inputs["image"].shape == (1, 3, 32, 40)
    assert [output.shape for output in problem.reference] == [(1, 10)]
    features = encoder_problem(encoder_case(TINY, size=(32, 40), features=True))
    assert len(features.reference) == 4
    # The head of a tiny model is small.
    assert 0.9 * problem.flops < features.flops < problem.flops


def test_flops_of_internimage_t():
    from dcnv3_tvm.bench.problems import encoder_flops

    # 4.9 G multiply-adds with the head, sampling included: published as "5 G".
    assert encoder_flops(encoder_case("internimage_t")) == pytest.approx(9.8e9, rel=0.02)


@pytest.mark.parametrize(
    "name", ["torch", "onnxruntime", "onnxruntime-deform", "openvino", "untuned"]
)
@pytest.mark.parametrize("kind", ["op", "encoder"])
def test_peers_are_correct(name, kind):
    if kind == "op":
        problem = operator_problem(DCNv3Spec.of((2, 9, 5, 8), group=2, offset_scale=1.5))
    else:
        problem = encoder_problem(encoder_case(TINY, features=True))
    (peer,) = select_peers([name])
    backend = builders.build_peer(peer, problem, default_threads())
    error = largest_error(outputs_of(backend), problem.reference, problem.measure)
    assert error <= backend.tolerance == PEER_TOLERANCE
    assert error < 1e-5


def test_bfloat16_encoder():
    exact = encoder_problem(encoder_case(TINY))
    problem = encoder_problem(encoder_case(TINY, dtype="bfloat16"))
    assert (exact.measure, problem.measure) == ("max", "norm")
    # The reference is the same; the weights take half the bytes.
    np.testing.assert_array_equal(problem.reference[0], exact.reference[0])
    assert 0.5 * exact.bytes < problem.bytes < 0.7 * exact.bytes
    (peer,) = select_peers(["openvino-bf16"], "bfloat16")
    backend = builders.build_peer(peer, problem, default_threads())
    outputs = outputs_of(backend)
    error = largest_error(outputs, problem.reference, problem.measure)
    assert error <= backend.tolerance == BF16_PEER_TOLERANCE
    wrong = [np.flip(output, 1).copy() for output in outputs]
    assert largest_error(wrong, problem.reference, problem.measure) > BF16_PEER_TOLERANCE


def test_encoder_is_compiled_for_the_dtype_of_the_case(monkeypatch):
    asked = []

    def fail(_, *, dtype, database):
        asked.append((dtype, database))
        raise RuntimeError("not today")

    monkeypatch.setattr(builders, "compile_model", fail)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(RuntimeError, match="not today"):
            build_all(encoder_problem(encoder_case(TINY, dtype=dtype)))
    assert asked == [("float32", "default"), ("bfloat16", "default")]


def test_our_backends_are_correct():
    problem = operator_problem(DCNv3Spec.of((1, 9, 5, 8), group=2))
    wrong = dataclasses.replace(problem, reference=[problem.reference[0] + 1e-3])
    for backend in build_all(problem).values():
        outputs = outputs_of(backend)
        assert largest_error(outputs, problem.reference, problem.measure) <= backend.tolerance
        assert largest_error(outputs, wrong.reference, problem.measure) > backend.tolerance
