import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import relax_op
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.op.relax_call import params_of, spec_of
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.tolerances import operator_bound
from helpers.relax_vm import compile_relax
from helpers.specs import random_inputs
from helpers.structure import block_names

GROUP2 = {"group": 2}


def tensor(shape, dtype="float32", **kwargs):
    return relax.TensorType(shape, dtype, **kwargs)


def sizes(names):
    return [tirx.Var(name, "int64") for name in names]


def parameters(*types):
    return [relax.Var(n, t) for n, t in zip(("x", "offset", "mask"), types, strict=True)]


def build(x, offset, mask, **attributes):
    """Build a module whose main function is one call of the operator."""
    builder = relax.BlockBuilder()
    params = parameters(x, offset, mask)
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(relax_op.dcnv3(*params, **attributes))
        builder.emit_func_output(result)
    module = builder.get()
    relax.analysis.well_formed(module)
    return module


def infer(x, offset, mask, **attributes):
    params = parameters(x, offset, mask)
    return relax.BlockBuilder().normalize(relax_op.dcnv3(*params, **attributes)).ty


def build_spec(spec):
    return build(
        *(tensor(shape, spec.dtype) for shape in (spec.input_shape, spec.offset_shape)),
        tensor(spec.mask_shape, spec.dtype),
        **spec.keywords(),
    )


def call_of(module):
    return module["main"].body.blocks[0].bindings[0].value


@pytest.mark.parametrize(
    ("attributes", "shape", "expected"),
    [
        ({}, (2, 7, 5, 32), (2, 7, 5, 32)),
        ({"stride": 2}, (1, 7, 10, 8), (1, 4, 5, 8)),
        ({"kernel_size": (2, 5), "pad": (0, 3)}, (1, 7, 6, 8), (1, 6, 8, 8)),
        ({"dilation": (2, 1), "remove_center": True}, (1, 9, 6, 8), (1, 7, 6, 8)),
    ],
)
def test_infers_static_shapes(attributes, shape, expected):
    spec = DCNv3Spec.of(shape, **GROUP2, **attributes)
    inferred = call_of(build_spec(spec)).ty
    assert inferred == tensor(expected)


def test_infers_symbolic_shapes():
    n, h, w = sizes("nhw")
    inferred = infer(tensor([n, h, w, 8]), tensor([n, h, w, 36]), tensor([n, h, w, 18]), **GROUP2)
    assert inferred == tensor([n, h, w, 8])

    halves = [n, (h - 1) // 2 + 1, (w - 1) // 2 + 1]
    inferred = infer(
        tensor([n, h, w, 8]), tensor([*halves, 36]), tensor([*halves, 18]), stride=2, **GROUP2
    )
    assert inferred == tensor([*halves, 8])


def test_infers_symbolic_channels():
    (c,) = sizes("c")
    assert infer(
        tensor([1, 4, 5, c]), tensor([1, 4, 5, 36]), tensor([1, 4, 5, 18]), **GROUP2
    ) == tensor([1, 4, 5, c])


@pytest.mark.parametrize(
    "types",
    [
        [tensor(None, ndim=4)] * 3,
        [tensor(None)] * 3,
        [tensor(None, ndim=4), tensor([1, 4, 5, 36]), tensor([1, 4, 5, 18])],
    ],
    ids=["rank", "nothing", "offset-and-mask"],
)
def test_infers_rank_of_unknown_shapes(types):
    assert infer(*types, **GROUP2) == tensor(None, ndim=4)


def test_infers_unknown_dtype():
    inferred = infer(
        *(tensor(shape, None) for shape in ([1, 4, 5, 8], [1, 4, 5, 36], None)), group=2
    )
    assert inferred.dtype is None
    assert [int(size) for size in inferred.shape] == [1, 4, 5, 8]


def test_unknown_offset_size_is_accepted():
    n, h, w, a, b = sizes("nhwab")
    inferred = infer(tensor([n, h, w, 8]), tensor([n, a, b, 36]), tensor(None), **GROUP2)
    assert inferred == tensor([n, h, w, 8])


@pytest.mark.parametrize(
    ("x", "offset", "mask", "attributes", "message"),
    [
        ([1, 8, 4, 5], [1, 4, 5, 36], [1, 4, 5, 18], {}, "NHWC is expected"),
        ([4, 5, 8], [1, 4, 5, 36], [1, 4, 5, 18], {}, "x does not have four dimensions"),
        ([1, 4, 5, 8], [4, 5, 36], [1, 4, 5, 18], {}, "offset does not have four dimensions"),
        ([1, 4, 5, 8], [1, 4, 5, 36], [4, 5, 18], {}, "mask does not have four dimensions"),
        ([1, 4, 5, 8], [1, 4, 5, 18], [1, 4, 5, 18], {}, r"offset .* allowed: shape \(1, 4, 5, 36"),
        ([1, 4, 5, 8], [1, 4, 5, 36], [1, 4, 6, 18], {}, r"mask .* allowed: shape \(1, 4, 5, 18"),
        ([1, 4, 5, 8], [2, 4, 5, 36], [1, 4, 5, 18], {}, "offset does not match"),
        ([1, 4, 5, 8], [1, 4, 5, 36], [1, 4, 5, 18], {"stride": 2}, "offset does not match"),
        ([1, 4, 5, 9], [1, 4, 5, 36], [1, 4, 5, 18], {}, "cannot be divided into 2 groups"),
        ([1, 2, 2, 8], [1, 2, 2, 36], [1, 2, 2, 18], {"pad": 0}, "output height would be 0"),
    ],
)
def test_rejects_shapes(x, offset, mask, attributes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        infer(tensor(x), tensor(offset), tensor(mask), **GROUP2, **attributes)


def test_rejects_a_symbolic_shape_that_differs():
    n, h, w = sizes("nhw")
    with pytest.raises(InvalidArgumentError, match="offset does not match"):
        infer(tensor([n, h, w, 8]), tensor([n, h + 1, w, 36]), tensor([n, h, w, 18]), **GROUP2)


def test_rejects_dtypes():
    shapes = [1, 4, 5, 8], [1, 4, 5, 36], [1, 4, 5, 18]
    with pytest.raises(InvalidArgumentError, match="offset: float16"):
        infer(tensor(shapes[0]), tensor(shapes[1], "float16"), tensor(shapes[2]), **GROUP2)
    with pytest.raises(InvalidArgumentError, match="dtype is not supported"):
        infer(*(tensor(shape, "int32") for shape in shapes), **GROUP2)


def test_rejects_arguments_that_are_not_tensors():
    with pytest.raises(InvalidArgumentError, match="mask is not a tensor"):
        infer(tensor([1, 4, 5, 8]), tensor([1, 4, 5, 36]), relax.ShapeType(ndim=4), **GROUP2)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"kernel_size": 0}, "kernel_size is out of range"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size is not an integer"),
        ({"stride": 0}, "stride is out of range"),
        ({"pad": -1}, "pad is out of range"),
        ({"dilation": 0}, "dilation is out of range"),
        ({"group": 0}, "group is out of range"),
        ({"offset_scale": float("nan")}, "offset_scale is not a finite number"),
        ({"kernel_size": 2, "remove_center": True}, "remove_center needs an odd kernel"),
    ],
)
def test_rejects_parameters(attributes, message):
    args = [relax.Var(name, tensor(None)) for name in ("x", "offset", "mask")]
    with pytest.raises(InvalidArgumentError, match=message):
        relax_op.dcnv3(*args, **({"group": 2} | attributes))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group": None}, "attributes of dcnv3_tvm.dcnv3 are not complete"),
        ({"extra": 1}, "attributes of dcnv3_tvm.dcnv3 are not complete"),
        ({"softmax": "yes"}, "softmax is not a boolean"),
        ({"offset_scale": "2"}, "offset_scale is not a finite number"),
        ({"pad": "same"}, "pad is not an integer"),
        ({"pad": [1, -1]}, "pad is out of range"),
    ],
)
def test_rejects_calls_with_invalid_attributes(changed, message):
    arguments = [relax.Var(name, tensor(None)) for name in ("x", "offset", "mask")]
    attributes = dict(relax_op.dcnv3(*arguments, group=2).attrs.items()) | changed
    attributes = {name: value for name, value in attributes.items() if value is not None}
    call = relax.Call(
        tvm.ir.Op.get(relax_op.OP_NAME),
        arguments,
        attrs=tvm.ir.make_node("ir.DictAttrs", **attributes),
    )
    with pytest.raises(InvalidArgumentError, match=message):
        relax.BlockBuilder().normalize(call)


def test_rejects_wrong_number_of_arguments():
    arguments = [relax.Var(name, tensor(None)) for name in ("x", "offset")]
    full = relax_op.dcnv3(*arguments, arguments[0], group=2)
    with pytest.raises(InvalidArgumentError, match="wrong number of arguments; got 2"):
        relax.BlockBuilder().normalize(relax.Call(full.op, arguments, attrs=full.attrs))


def test_params_and_spec_of_a_call():
    spec = DCNv3Spec.of(
        (1, 9, 6, 8),
        group=4,
        kernel_size=(3, 5),
        stride=(1, 2),
        pad=(0, 2),
        dilation=(2, 1),
        offset_scale=1.5,
        remove_center=True,
        softmax=True,
        dtype="float16",
    )
    call = call_of(build_spec(spec))
    assert relax_op.is_dcnv3(call)
    assert params_of(call) == spec.params
    assert spec_of(call) == spec
    assert not relax_op.is_dcnv3(relax.op.add(call.args[0], call.args[0]))


def test_spec_of_needs_channels():
    arguments = [relax.Var(name, tensor(None)) for name in ("x", "offset", "mask")]
    with pytest.raises(InvalidArgumentError, match="channels or the dtype of x are unknown"):
        spec_of(relax_op.dcnv3(*arguments, group=2))


def symbolic_module():
    n, h, w = sizes("nhw")
    return build(tensor([n, h, w, 8]), tensor([n, h, w, 36]), tensor([n, h, w, 18]), group=2)


def static_module():
    return build_spec(DCNv3Spec.of((1, 5, 4, 8), group=2, offset_scale=0.1, remove_center=True))


@pytest.mark.parametrize("make", [static_module, symbolic_module])
def test_round_trips_through_tvmscript(make):
    module = make()
    again = relax_op.from_script(module.script(show_meta=True))
    tvm.ir.assert_structural_equal(again, module)
    relax.analysis.well_formed(again)
    assert params_of(call_of(again)) == params_of(call_of(module))


def test_tvm_parser_reads_static_shapes():
    module = static_module()
    again = tvm.script.from_source(module.script(show_meta=True))
    tvm.ir.assert_structural_equal(again, module)


@pytest.mark.parametrize("make", [static_module, symbolic_module])
def test_round_trips_through_json(make):
    module = make()
    again = tvm.ir.load_json(tvm.ir.save_json(module))
    tvm.ir.assert_structural_equal(again, module)
    assert params_of(call_of(again)) == params_of(call_of(module))


def test_is_pure():
    assert tvm.ir.Op.get(relax_op.OP_NAME).get_attr("FPurity")
    shapes = {"x": [1, 4, 5, 8], "offset": [1, 4, 5, 36], "mask": [1, 4, 5, 18]}
    params = [relax.Var(name, tensor(shape)) for name, shape in shapes.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            builder.emit(relax_op.dcnv3(*params, group=2))
            result = builder.emit_output(relax.op.negative(params[0]))
        builder.emit_func_output(result)
    module = relax.transform.DeadCodeElimination()(builder.get())
    assert [binding.value.op.name for binding in module["main"].body.blocks[0].bindings] == [
        "relax.negative"
    ]


def check_run(machine, spec):
    drawn = random_inputs(spec)
    arrays = drawn.x, drawn.offset, drawn.mask
    output = machine["main"](*(tvm.runtime.tensor(array) for array in arrays)).numpy()
    expected = dcnv3_reference(*arrays, spec)
    assert np.all(np.abs(output - expected) <= operator_bound(spec, *arrays, expected))


@pytest.mark.parametrize("softmax", [False, True])
def test_legalizes_and_runs(softmax):
    spec = DCNv3Spec.of((2, 5, 7, 8), group=2, stride=(1, 2), softmax=softmax)
    module = relax.transform.LegalizeOps()(build_spec(spec))
    assert call_of(module).op == tvm.ir.Op.get("relax.call_tir")
    machine = compile_relax(module)
    check_run(machine, spec)


def test_legalizes_to_the_variant_for_the_current_target():
    with resolve_target("cuda-sm90"):
        module = relax.transform.LegalizeOps()(symbolic_module())
    (kernel,) = (func for func in module.functions.values() if isinstance(func, tirx.PrimFunc))
    assert "patch" in block_names(kernel)


def test_legalizes_symbolic_shapes_and_runs():
    machine = compile_relax(symbolic_module())
    for shape in ((1, 1, 1, 8), (3, 4, 9, 8)):
        spec = DCNv3Spec.of(shape, group=2)
        check_run(machine, spec)


def test_equal_problems_share_a_kernel():
    shapes = {"x": [1, 4, 5, 8], "offset": [1, 4, 5, 36], "mask": [1, 4, 5, 18]}
    params = [relax.Var(name, tensor(shape)) for name, shape in shapes.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            once = builder.emit(relax_op.dcnv3(*params, group=2))
            twice = builder.emit_output(relax_op.dcnv3(once, *params[1:], group=2))
        builder.emit_func_output(twice)
    module = relax.transform.LegalizeOps()(builder.get())
    assert len([f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]) == 1


def test_converted_layouts_stay_nhwc():
    shapes = {
        "x": [1, 8, 6, 5],
        "kernel": [8, 8, 3, 3],
        "offset": [1, 6, 5, 36],
        "mask": [1, 6, 5, 18],
    }
    x, kernel, offset, mask = (relax.Var(n, tensor(shape)) for n, shape in shapes.items())
    builder = relax.BlockBuilder()
    with builder.function("main", [x, kernel, offset, mask]):
        with builder.dataflow():
            before = builder.emit(relax.op.nn.conv2d(x, kernel, padding=1))
            nhwc = builder.emit(relax.op.permute_dims(before, [0, 2, 3, 1]))
            sampled = builder.emit(relax_op.dcnv3(nhwc, offset, mask, group=2))
            nchw = builder.emit(relax.op.permute_dims(sampled, [0, 3, 1, 2]))
            after = builder.emit_output(relax.op.nn.conv2d(nchw, kernel, padding=1))
        builder.emit_func_output(after)
    module = relax.transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"]})(builder.get())
    relax.analysis.well_formed(module)
    values = [binding.value for binding in module["main"].body.blocks[0].bindings]
    (call,) = (value for value in values if relax_op.is_dcnv3(value))
    assert [int(size) for size in call.args[0].ty.shape] == [1, 6, 5, 8]
    assert call.ty == tensor([1, 6, 5, 8])
    convolutions = [v for v in values if getattr(v.op, "name", "") == "relax.nn.conv2d"]
    assert [convolution.attrs.data_layout for convolution in convolutions] == ["NHWC", "NHWC"]


def test_a_transposed_layout_is_transposed_back():
    """ConvertLayout changes the layout of x, made by a convolution that reads NHWC as NCHW."""
    shapes = {"x": [1, 6, 5, 8], "kernel": [6, 6, 1, 1]}
    x, kernel = (relax.Var(name, tensor(shape)) for name, shape in shapes.items())
    offset, mask = (relax.Var(n, tensor([1, 6, 5, c])) for n, c in (("o", 36), ("m", 18)))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, kernel, offset, mask]):
        with builder.dataflow():
            mixed = builder.emit(relax.op.nn.conv2d(x, kernel))
            sampled = builder.emit(relax_op.dcnv3(mixed, offset, mask, group=2))
            result = builder.emit_output(relax.op.negative(sampled))
        builder.emit_func_output(result)
    module = relax.transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"]})(builder.get())
    relax.analysis.well_formed(module)
    values = [binding.value for binding in module["main"].body.blocks[0].bindings]
    (call,) = (value for value in values if relax_op.is_dcnv3(value))
    assert [int(size) for size in call.args[0].ty.shape] == [1, 6, 5, 8]


def test_mixed_precision_casts_the_tensors():
    module = build(tensor([1, 4, 5, 8]), tensor([1, 4, 5, 36]), tensor([1, 4, 5, 18]), group=2)
    module = relax.transform.ToMixedPrecision(out_dtype="float16")(module)
    values = [binding.value for binding in module["main"].body.blocks[0].bindings]
    (call,) = (value for value in values if relax_op.is_dcnv3(value))
    assert {str(argument.ty.dtype.dtype) for argument in call.args} == {"float16"}
    assert call.ty == tensor([1, 4, 5, 8], "float16")
    assert module["main"].ret_ty == tensor([1, 4, 5, 8])
