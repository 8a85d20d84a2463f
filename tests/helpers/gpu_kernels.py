"""GPU kernels with the padding that `dcnv3_tvm.transform.lower_gpu` chooses."""

import math

from dcnv3_tvm.kernels import gemm as gemm_kernels
from dcnv3_tvm.kernels.convolution import output_size
from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.mlp import mlp as mlp_kernel
from dcnv3_tvm.op.expr import int64, product
from dcnv3_tvm.schedules import choose_run
from dcnv3_tvm.transform.gpu_padding import gemm_padding


def gemm(lead, inputs, outputs, **options):
    padding = gemm_padding(_rows(lead), inputs)
    return gemm_kernels.gemm(lead, inputs, outputs, padding=padding, **options)


def implicit_gemm(batch, height, width, inputs, outputs, *, kernel_size, stride, pad, **options):
    window = {"kernel_size": kernel_size, "stride": stride, "pad": pad}
    pixels = output_size((height, width), **window)
    padding = gemm_padding(_rows([batch, *pixels]), math.prod(kernel_size) * inputs)
    sizes = batch, height, width, inputs, outputs
    return gemm_kernels.implicit_gemm(*sizes, **window, padding=padding, **options)


def depthwise(*sizes, **options):
    run = choose_run(depthwise_kernel(*sizes, **options))
    return depthwise_kernel(*sizes, **options, run=run)


def mlp(lead, inputs, hidden, outputs, **options):
    padding = gemm_padding(_rows(lead), inputs)
    return mlp_kernel(lead, inputs, hidden, outputs, padding=padding, **options)


def pack_gemm_weight(weight):
    padding = gemm_padding(1, weight[0].size)
    extents = zip(weight.reshape(len(weight), -1).shape, padding[1:3], strict=True)
    padded = [gemm_kernels.round_up(*extent) for extent in extents]
    return gemm_kernels.pack_gemm_weight(
        weight, padded[::-1] if weight.dtype == gemm_kernels.ACCUMULATOR else padded
    )


def _rows(lead):
    return product([int64(size) for size in lead])
