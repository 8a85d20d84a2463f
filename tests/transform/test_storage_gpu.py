import pytest
from tvm import relax

from dcnv3_tvm.op import relax_op
from dcnv3_tvm.schedules import choose_run
from dcnv3_tvm.transform.fuse_sampling import fuse_sampling
from dcnv3_tvm.transform.lower_gpu import lower_gpu
from dcnv3_tvm.transform.storage_gpu import MANY_SUMS
from helpers.arrays import random_array
from helpers.programs import kernel_types, make_program


@pytest.mark.parametrize(("dtype", "offsets"), [("float16", "float16"), ("bfloat16", "float32")])
def test_sampling_offsets(dtype, offsets, rng):
    def build(bb, x, square, offset_weight, offset_bias, mask_weight, mask_bias):
        value = bb.emit(relax.op.matmul(x, square))
        offset = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, offset_weight)), offset_bias))
        logits = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, mask_weight)), mask_bias))
        grouped = bb.emit(relax.op.reshape(logits, (1, 5, 4, 2, 9)))
        softmax = bb.emit(relax.op.nn.softmax(grouped, axis=-1))
        mask = bb.emit(relax.op.reshape(softmax, (1, 5, 4, 18)))
        sampled = bb.emit(relax_op.dcnv3(value, offset, mask, group=2))
        return bb.emit(relax.op.matmul(sampled, square))

    weights = {
        "square": random_array(rng, 16, 16),
        "offset_weight": random_array(rng, 16, 36),
        "offset_bias": random_array(rng, 36),
        "mask_weight": random_array(rng, 16, 18),
        "mask_bias": random_array(rng, 18),
    }
    program = fuse_sampling(make_program(build, {"x": (1, 5, 4, 16)}, weights))
    types = kernel_types(lower_gpu(program, choose_run, dtype))
    assert types["matmul_16_64"] == ["float32", dtype, "float32", offsets]  # x, weight, bias, out
    assert types["dcnv3_packed"] == [dtype, offsets, dtype]  # x, offset_mask, out


@pytest.mark.parametrize(("sums", "stream"), [(MANY_SUMS - 1, "float16"), (MANY_SUMS, "float32")])
def test_residual_streams_of_many_sums(sums, stream, rng):
    def build(bb, x, square, bias, gamma, beta):
        value = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, square)), bias))
        for _ in range(sums):
            norm = bb.emit(relax.op.nn.layer_norm(value, gamma, beta, axes=[-1]))
            value = bb.emit(relax.op.add(value, bb.emit(relax.op.matmul(norm, square))))
        norm = bb.emit(relax.op.nn.layer_norm(value, gamma, beta, axes=[-1]))
        return bb.emit(relax.op.matmul(norm, square))

    shapes = {"square": (16, 16), "bias": (16,), "gamma": (16,), "beta": (16,)}
    weights = {name: random_array(rng, *shape) for name, shape in shapes.items()}
    types = kernel_types(
        lower_gpu(make_program(build, {"x": (5, 16)}, weights), choose_run, "float16")
    )
    # x, weight, residual, out
    assert types["matmul_16_16_residual"] == ["float16", "float16", stream, stream]
    assert types["layer_norm_16"] == [stream, "float32", "float32", "float16"]
