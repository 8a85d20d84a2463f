"""The operator and models on a real GPU, with PyTorch's streams, graphs and memory.

Without TVM they need DCNV3_TVM_FIRST_CONTACT, a folder of `benchmarks/gpu_first_contact.py`.
"""

import numpy as np
import pytest
import torch

import dcnv3_tvm as dt
from dcnv3_tvm import gpu, runtime
from dcnv3_tvm.compiler import compile_kernel
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.tolerances import operator_bound
from helpers import prebuilt
from helpers.prebuilt import DTYPES, HAS_TVM, SQUARE, UNALIGNED
from helpers.specs import random_inputs
from helpers.toy import Toy

pytestmark = pytest.mark.skipif(
    not (gpu.devices() and torch.cuda.is_available()), reason="needs a GPU"
)

SLEEP = 50_000_000  # Cycles; about 30 ms.


@pytest.fixture(scope="module")
def here() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Without TVM, operators are read."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_TVM:
            patch.setattr(compile_kernel, "_compile", prebuilt.read_kernel)
        yield


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.build(1, arch=gpu.device(0).arch) if HAS_TVM else prebuilt.PrebuiltToy.read()


@pytest.fixture
def model(toy, tmp_path):
    with runtime.load(toy.write(tmp_path / "toy")) as loaded:
        yield loaded


@pytest.fixture
def images(here):
    return torch.randn(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(here)


def tensors_of(spec, device):
    inputs = random_inputs(spec, seed=3)
    dtype = getattr(torch, spec.dtype)
    arrays = [np.asarray(array, np.float64) for array in (inputs.x, inputs.offset, inputs.mask)]
    return [torch.from_numpy(array).to(dtype).to(device) for array in arrays]


def check(spec, tensors, output):
    arrays = [tensor.double().cpu().numpy() for tensor in tensors]
    expected = dcnv3_reference(*arrays, spec)
    error = np.abs(output.double().cpu().numpy() - expected)
    assert np.all(error <= operator_bound(spec, *arrays, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("shape", "group", "more"), prebuilt.SHAPES)
def test_operator(here, shape, group, dtype, softmax, more):
    spec = DCNv3Spec.of(shape, group=group, dtype=dtype, softmax=softmax, **more)
    tensors = tensors_of(spec, here)
    output = dt.dcnv3(*tensors, group=group, softmax=softmax, **more)
    assert output.device == here
    assert output.dtype == tensors[0].dtype
    check(spec, tensors, output)
    assert dt.compile_op(spec, "cuda")(*tensors).equal(output)


def test_operator_on_strided_and_unaligned_tensors(here):
    spec = UNALIGNED
    x, offset, mask = tensors_of(spec, here)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    memory = torch.empty(offset.numel() + 1, dtype=offset.dtype, device=here)
    unaligned = memory[1:].view(offset.shape).copy_(offset)
    assert unaligned.data_ptr() % 16
    check(spec, (x, offset, mask), dt.dcnv3(strided, unaligned, mask, group=4))


def test_operator_runs_on_the_current_stream(here):
    spec = SQUARE
    tensors = tensors_of(spec, here)
    x = torch.zeros_like(tensors[0])
    dt.dcnv3(x, *tensors[1:], group=4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        x.copy_(tensors[0])
        output = dt.dcnv3(x, *tensors[1:], group=4)
    stream.synchronize()
    check(spec, tensors, output)


def test_operator_in_a_torch_cuda_graph(here):
    spec = SQUARE
    tensors = tensors_of(spec, here)
    x = torch.zeros_like(tensors[0])
    dt.dcnv3(x, *tensors[1:], group=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = dt.dcnv3(x, *tensors[1:], group=4)
    x.copy_(tensors[0])
    graph.replay()
    check(spec, tensors, output)


def test_operator_under_torch_compile(here):
    from dcnv3_tvm.pytorch.operator import dcnv3

    spec = SQUARE
    tensors = tensors_of(spec, here)
    compiled = torch.compile(lambda *t: dcnv3(*t, group=4) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        check(spec, tensors, compiled(*tensors) / 2)


def test_operator_on_tensors_of_two_devices(here):
    spec = SQUARE
    x, offset, mask = tensors_of(spec, here)
    with pytest.raises(InvalidArgumentError, match="mask: cpu; allowed: the same for all"):
        dt.dcnv3(x, offset, mask.cpu(), group=4)
    if HAS_TVM:
        with pytest.raises(InvalidArgumentError, match="got cuda:0; allowed: cpu"):
            dt.compile_op(spec)(x, offset, mask)


def test_model_on_torch_tensors(model, toy, images):
    results = [model(image) for image in images]
    assert all(result.device == images.device for result in results)
    again = [model(image) for image in images]
    for image, result, replayed in zip(images, results, again, strict=True):
        np.testing.assert_array_equal(result.cpu().numpy(), toy.main(image.cpu().numpy()))
        assert result.equal(replayed)
    maps = model.features(images[0])
    np.testing.assert_array_equal(maps[1].cpu().numpy(), images[0].cpu().relu().numpy())


def test_model_on_numpy_arrays(model, toy, images):
    for image in images.cpu().numpy():
        result = model(image)
        assert isinstance(result, np.ndarray)
        np.testing.assert_array_equal(result, toy.main(image))


def test_model_on_two_streams(model, toy, images):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for turn in range(8):
        with torch.cuda.stream(streams[turn % 2]):
            torch.cuda._sleep(SLEEP if turn % 2 == 0 else 0)
            results.append(model(images[turn % 4]))
    torch.cuda.synchronize()
    for turn, result in enumerate(results):
        expected = toy.main(images[turn % 4].cpu().numpy())
        np.testing.assert_array_equal(result.cpu().numpy(), expected)


def test_model_waits_for_its_input(model, toy, images):
    model(images[0])
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        image = torch.zeros_like(images[0])
        torch.cuda._sleep(SLEEP)
        image.copy_(images[1])
        result = model(image)
        expected = toy.main(images[1].cpu().numpy())
        np.testing.assert_array_equal(result.cpu().numpy(), expected)


def test_two_models(toy, tmp_path, images):
    models = [runtime.load(toy.write(tmp_path / name)) for name in "ab"]
    for image in images:
        first, second = (model(image) for model in models)
        assert first.equal(second)


def test_model_on_a_cpu_tensor_and_during_graph_capture(model, images):
    with pytest.raises(InvalidArgumentError, match=r'on cpu; allowed: cuda:0. Use x\.to\("cuda:0"'):
        model(images[0].cpu())
    graph = torch.cuda.CUDAGraph()
    model(images[0])
    with pytest.raises(InvalidArgumentError, match="cannot be captured"), torch.cuda.graph(graph):
        model(images[0])


def test_close_frees_the_memory(toy, tmp_path, images):
    path = toy.write(tmp_path / "toy")

    def cycle():
        with runtime.load(path) as model:
            model(images[0])
            model.features(images[0])
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    first = cycle()
    assert min(cycle() for _ in range(5)) >= first - 2**21


def test_current_device_is_restored(toy, tmp_path, images):
    if len(gpu.devices()) < 2 or not gpu.runs_on(gpu.device(0).arch, gpu.device(1).arch):
        pytest.skip("needs two GPUs")
    with runtime.load(toy.write(tmp_path / "toy"), device="cuda:1") as model:
        result = model(images[0].to("cuda:1"))
        assert result.device.index == 1
        assert torch.cuda.current_device() == 0
        with pytest.raises(InvalidArgumentError, match="on cuda:0; allowed: cuda:1"):
            model(images[0])
