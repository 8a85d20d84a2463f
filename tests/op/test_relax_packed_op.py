import pytest
import tvm
from tvm import relax, tirx

from dcnv3_tvm.op import relax_packed_op
from dcnv3_tvm.op.relax_call import spec_of
from dcnv3_tvm.op.tensorir import packed_channels
from dcnv3_tvm.spec import DCNv3Params
from dcnv3_tvm.targets import resolve_target
from helpers.structure import block_names

PARAMS = DCNv3Params(group=2, softmax=True)
CHANNELS = packed_channels(PARAMS)


def build(sizes, *, center_feature=False, offset_dtype="float32"):
    """Make a module whose main is one call; ``sizes`` are those of x and of the result."""
    (n, height, width), (out_height, out_width) = sizes
    x = relax.Var("x", relax.TensorType([n, height, width, 8], "float16"))
    packed = relax.TensorType([n, out_height, out_width, CHANNELS], offset_dtype)
    params = [x, relax.Var("offset_mask", packed)]
    builder = relax.BlockBuilder()
    call = relax_packed_op.dcnv3_packed(*params, PARAMS, center_feature=center_feature)
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    return builder.get()


def call_of(module):
    return module["main"].body.blocks[0].bindings[0].value


def kernel_of(module):
    (kernel,) = (func for func in module.functions.values() if isinstance(func, tirx.PrimFunc))
    return kernel


STATIC = (1, 5, 6), (5, 6)


def test_infers_the_type_of_x_and_the_size_of_the_offsets():
    n, h, w, ho, wo = (tirx.Var(name, "int64") for name in ("n", "h", "w", "ho", "wo"))
    assert call_of(build(((n, h, w), (ho, wo)))).ty == relax.TensorType([n, ho, wo, 8], "float16")
    assert call_of(build(STATIC)).ty == relax.TensorType([1, 5, 6, 8], "float16")


@pytest.mark.parametrize("center_feature", [False, True], ids=["plain", "center"])
def test_recognizes_its_calls(center_feature):
    call = call_of(build(STATIC, center_feature=center_feature))
    assert relax_packed_op.is_dcnv3_packed(call)
    assert not relax_packed_op.is_dcnv3_packed(relax.op.negative(call.args[0]))
    assert spec_of(call).output_size == (5, 6)


def test_kernel_has_the_types_of_the_arguments():
    call = call_of(build(STATIC))
    kernel = relax_packed_op.kernel_of(call, "bfloat16", vector_loads=False)
    assert [str(buffer.dtype) for buffer in kernel.params] == ["float16", "float32", "bfloat16"]


@pytest.mark.parametrize(("target", "loads"), [(None, 0), ("cpu-x86-64", 0), ("cuda-sm90", 1)])
def test_legalizes_for_the_current_target(target, loads):
    module = build(STATIC, center_feature=True)
    if target is None:
        legalized = relax.transform.LegalizeOps()(module)
    else:
        with resolve_target(target):
            legalized = relax.transform.LegalizeOps()(module)
    assert call_of(legalized).op == tvm.ir.Op.get("relax.call_tir")
    names = block_names(kernel_of(legalized))
    assert (names.count("patch"), names.count("gate")) == (loads, 1)
