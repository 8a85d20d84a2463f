"""Gradients of Relax functions with DCNv3, compiled for this machine, compared with PyTorch."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from tvm import relax, tirx
from tvm.relax import training

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import relax_gradient, relax_op
from dcnv3_tvm.op.relax_packed_op import dcnv3_packed
from dcnv3_tvm.op.tensorir import packed_channels
from dcnv3_tvm.pytorch.dcnv3_module import softmax_over_points
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.pytorch_reference import grid_sampling
from helpers.relax_vm import compile_scheduled

SPEC = DCNv3Spec.of((2, 5, 7, 8), group=2, pad=(1, 0), offset_scale=1.5, dtype="float64")
STRIDED = DCNv3Spec.of((3, 6, 5, 6), group=3, stride=(2, 1), remove_center=True, softmax=True)
PACKED = DCNv3Spec.of((1, 5, 4, 8), group=2, softmax=True)

ROUNDING = {
    "float64": 1e-12,
    # y, two gradients and their sum are each rounded to 11 bits.
    "float16": 2e-3,
}
"""Tolerated errors of gradients, relative to the largest element."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """The function ``sum(activation(dcnv3(x, ...)) * weight)``, in Relax and in PyTorch.

    With `projections`, x, offset and mask are those of one image, and DCNv3 is followed by another
    projection and SiLU.
    """

    spec: DCNv3Spec
    form: str = "separate"
    projections: bool = False
    symbolic: bool = False

    @property
    def shapes(self):
        """Shapes of weight, x, and of offset and mask or of the packed tensor."""
        spec = self.spec
        n, h, w = spec.batch, spec.height, spec.width
        if self.symbolic:
            n, h, w = (tirx.Var(name, "int64") for name in "nhw")
        if self.form == "separate":
            channels = [spec.offset_channels, spec.mask_channels]
        else:
            channels = [packed_channels(spec, center_feature=self.form == "center")]
        out = n, spec.output_extent(h, 0), spec.output_extent(w, 1)
        return [(*out, spec.channels), (n, h, w, spec.channels), *((*out, c) for c in channels)]

    @property
    def matrices(self):
        """Shapes of the projections."""
        if not self.projections:
            return []
        first, *sampled = [shape[-1] for shape in self.shapes]
        return [(channels, channels) for channels in (first, *sampled)]

    def add_to(self, builder, name):
        shapes = self.shapes + self.matrices
        params = [
            relax.Var(f"p{i}", relax.TensorType(shape, self.spec.dtype))
            for i, shape in enumerate(shapes)
        ]
        weight, *tensors = params[: len(self.shapes)]
        matrices = params[len(self.shapes) :]
        with builder.function(name, params):
            with builder.dataflow():
                if matrices:
                    last, *firsts = matrices
                    pairs = zip(tensors, firsts, strict=True)
                    tensors = [builder.emit(relax.op.matmul(*pair)) for pair in pairs]
                if self.form == "separate":
                    call = relax_op.dcnv3(*tensors, **self.spec.params.keywords())
                else:
                    center = self.form == "center"
                    call = dcnv3_packed(*tensors, self.spec.params, center_feature=center)
                y = builder.emit(call)
                if matrices:
                    y = builder.emit(relax.op.nn.silu(relax.op.matmul(y, last)))
                loss = builder.emit_output(relax.op.sum(relax.op.multiply(y, weight)))
            builder.emit_func_output(loss)

    def arrays(self):
        # With this seed, no offset in float16 is an integer, where gradients are one-sided.
        rng = np.random.default_rng(2)
        static = dataclasses.replace(self, symbolic=False)
        shapes = static.shapes + static.matrices
        return [0.7 * rng.standard_normal(shape).astype(self.spec.dtype) for shape in shapes]

    def pytorch(self, *params):
        spec = self.spec
        weight, *tensors = params[: len(self.shapes)]
        matrices = params[len(self.shapes) :]
        if matrices:
            last, *firsts = matrices
            tensors = [tensor @ first for tensor, first in zip(tensors, firsts, strict=True)]
        x, offset, *rest = tensors
        if self.form != "separate":
            sizes = np.cumsum([spec.offset_channels, spec.mask_channels, spec.group])
            offset, *rest = offset.tensor_split(sizes.tolist(), dim=-1)
        mask = softmax_over_points(rest[0], spec) if spec.softmax else rest[0]
        y = grid_sampling(x, offset, mask, spec)
        if self.form == "center":
            share = rest[1].sigmoid().repeat_interleave(spec.group_channels, dim=-1)
            y = y * (1 - share) + x * share
        if matrices:
            y = F.silu(y @ last)
        return (y * weight).sum()


def of(spec, dtype):
    return dataclasses.replace(spec, dtype=dtype)


GRAPHS = {
    "static": Graph(SPEC, projections=True),
    "symbolic": Graph(of(STRIDED, "float64"), projections=True, symbolic=True),
    "packed": Graph(of(PACKED, "float64"), "packed", symbolic=True),
    "center": Graph(of(PACKED, "float64"), "center", symbolic=True),
    "half": Graph(of(PACKED, "float16"), "center"),
}


def adjoints(graphs):
    """Make a module of the graphs and their gradients."""
    builder = relax.BlockBuilder()
    for name, graph in graphs.items():
        graph.add_to(builder, name)
    module = builder.get()
    for name in graphs:
        module = relax.transform.Gradient(name)(module)
    relax.analysis.well_formed(module)
    return module


@pytest.fixture(scope="module")
def machine():
    machine, kernels = compile_scheduled(adjoints(GRAPHS))
    assert {kernel.rule for kernel in kernels.values()} == {
        "dcnv3",
        "dcnv3_grad_x",
        "dcnv3_grad_offset_mask",
        "fallback",
    }
    return machine


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_of_a_graph_are_those_of_pytorch(machine, name):
    graph = GRAPHS[name]
    arrays = graph.arrays()
    tensors = [torch.from_numpy(array.astype(np.float64)).requires_grad_() for array in arrays]
    graph.pytorch(*tensors).backward()
    _, gradients = machine[f"{name}_adjoint"](*map(tvm.runtime.tensor, arrays))
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert gradient.dtype == graph.spec.dtype
        expected = tensor.grad.numpy()
        error = np.abs(gradient.numpy().astype(np.float64) - expected).max()
        assert error <= ROUNDING[graph.spec.dtype] * np.abs(expected).max()


def test_a_packed_tensor_without_padding():
    graph = Graph(DCNv3Spec.of((1, 3, 4, 32), group=16, softmax=True), "packed")
    module = adjoints({"main": graph})
    _, gradients = module["main_adjoint"].ret_ty.fields
    assert gradients.fields[2] == relax.TensorType((1, 3, 4, 432), "float32")


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([1], {relax_op.OP_NAME, relax_gradient.GRAD_X_OP_NAME}),
        ([2, 3], {relax_op.OP_NAME, relax_gradient.GRAD_OFFSET_MASK_OP_NAME}),
        ([0], {relax_op.OP_NAME}),
    ],
)
def test_only_gradients_that_are_needed_are_computed(indices, expected):
    builder = relax.BlockBuilder()
    Graph(SPEC).add_to(builder, "main")
    params = [builder.get()["main"].params[index] for index in indices]
    module = relax.transform.Gradient("main", require_grads=params)(builder.get())
    bindings = module["main_adjoint"].body.blocks[0].bindings
    names = [binding.value.op.name for binding in bindings if hasattr(binding.value, "op")]
    assert {name for name in names if name.startswith("dcnv3_tvm.")} == expected


def test_a_gradient_graph_round_trips_through_tvmscript():
    module = adjoints({"main": GRAPHS["symbolic"], "packed": GRAPHS["packed"]})
    again = relax_op.from_script(module.script(show_meta=True))
    tvm.ir.assert_structural_equal(again, module)


def infer(types, name=relax_gradient.GRAD_OFFSET_MASK_OP_NAME):
    names = ("grad", "x", "offset", "mask")
    arguments = [relax.Var(n, relax.TensorType(*t)) for n, t in zip(names, types, strict=True)]
    build = {
        relax_gradient.GRAD_X_OP_NAME: relax_gradient.dcnv3_grad_x,
        relax_gradient.GRAD_OFFSET_MASK_OP_NAME: relax_gradient.dcnv3_grad_offset_mask,
    }[name]
    return relax.BlockBuilder().normalize(build(*arguments, DCNv3Params(group=2))).ty


FITTING = {"grad": [1, 4, 5, 8], "x": [1, 4, 5, 8], "offset": [1, 4, 5, 36], "mask": [1, 4, 5, 18]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad": ([1, 4, 5, 9], "float32")}, r"grad does not .* allowed: shape \(1, 4, 5, 8\)"),
        ({"grad": ([1, 4, 6, 8], "float32")}, "gradient of the result .N, Ho, Wo, C., with 2 gro"),
        ({"grad": ([4, 5, 8], "float32")}, "grad does not have four dimensions"),
        ({"grad": ([1, 4, 5, 8], "float16")}, "grad, x, offset and mask differ in dtype; got gra"),
        ({"offset": ([1, 4, 6, 36], "float32")}, "offset does not match x and the attributes"),
        ({"x": ([1, 8, 4, 5], "float32")}, "NHWC is expected"),
    ],
)
@pytest.mark.parametrize(
    "name", [relax_gradient.GRAD_X_OP_NAME, relax_gradient.GRAD_OFFSET_MASK_OP_NAME]
)
def test_rejects_arguments(name, changed, message):
    types = {key: (shape, "float32") for key, shape in FITTING.items()} | changed
    with pytest.raises(InvalidArgumentError, match=message):
        infer(types.values(), name)


def test_infers_unknown_shapes():
    types = infer([(None, "float32", None, 4), (FITTING["x"], "float32"), (None, None), (None,)])
    assert types.fields == [relax.TensorType(None, None), relax.TensorType(None)]


def test_differentiating_a_gradient_is_rejected():
    builder = relax.BlockBuilder()
    params = [
        relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in FITTING.items()
    ]
    with builder.function("main", params):
        with builder.dataflow():
            gradient = builder.emit(relax_gradient.dcnv3_grad_x(*params, DCNv3Params(group=2)))
            loss = builder.emit_output(relax.op.sum(gradient))
        builder.emit_func_output(loss)
    with pytest.raises(InvalidArgumentError, match=r"no second derivatives; got .*grad_x"):
        relax.transform.Gradient("main")(builder.get())


def test_gradients_are_scheduled_for_gpus():
    target = resolve_target("cuda-sm90")
    with target:
        module = relax.transform.LegalizeOps()(adjoints({"main": Graph(of(SPEC, "float16"))}))
    _, kernels = schedule_module(module, target, intrinsics=False)
    rules = {name: kernel.rule for name, kernel in kernels.items()}
    for name in ("dcnv3_grad_x", "dcnv3_grad_offset_mask"):
        assert rules[name] == name


@pytest.mark.slow
def test_training_follows_pytorch():
    """Ten steps of momentum SGD; TVM 0.27's Adam fails on every parameter type."""
    params = DCNv3Params(group=2, softmax=True)
    shapes = {
        "image": (4, 3, 6, 5),
        "stem": (8, 3, 3, 3),
        "to_x": (8, 8),
        "to_offset": (8, 36),
        "to_mask": (8, 18),
        "head": (8, 3),
    }
    rng = np.random.default_rng(0)
    weights = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    image, labels = weights.pop("image"), rng.standard_normal((4, 3))

    variables = [relax.Var(n, relax.TensorType(shape, "float64")) for n, shape in shapes.items()]
    builder = relax.BlockBuilder()
    with builder.function("backbone", variables):
        with builder.dataflow():
            source, stem, *projections, head = variables
            features = relax.op.nn.conv2d(source, stem, padding=1)
            features = builder.emit(relax.op.permute_dims(features, [0, 2, 3, 1]))
            sampling = [builder.emit(relax.op.matmul(features, each)) for each in projections]
            y = relax.op.nn.silu(relax_op.dcnv3(*sampling, **params.keywords()))
            logits = builder.emit_output(relax.op.matmul(relax.op.mean(y, [1, 2]), head))
        builder.emit_func_output(logits)
    module = builder.get().with_attrs({"param_num": len(weights), "state_num": 0})
    setup = training.SetupTrainer(
        training.loss.MSELoss("sum"),
        training.optimizer.MomentumSGD(0.05, 0.9),
        [relax.TensorType(labels.shape, "float64")] * 2,
    )
    module = setup(module)
    trainer = training.Trainer(module, compile_scheduled(module)[0], tvm.cpu(), False)
    trainer.load_params(weights)

    tensors = {n: torch.from_numpy(array.copy()).requires_grad_() for n, array in weights.items()}
    optimizer = torch.optim.SGD(tensors.values(), lr=0.05, momentum=0.9)
    for _ in range(10):
        features = F.conv2d(torch.from_numpy(image), tensors["stem"], padding=1)
        features = features.permute(0, 2, 3, 1)
        x, offset, logits = (features @ tensors[n] for n in ("to_x", "to_offset", "to_mask"))
        y = grid_sampling(x, offset, softmax_over_points(logits, params), params)
        result = F.silu(y).mean((1, 2)) @ tensors["head"]
        loss = F.mse_loss(result, torch.from_numpy(labels), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step = trainer.update(image, labels).numpy()
        np.testing.assert_allclose(step, loss.item(), rtol=1e-10)
    for name, value in trainer.export_params().items():
        np.testing.assert_allclose(value.numpy(), tensors[name].detach(), rtol=0, atol=1e-10)
