import pytest
from tvm import tirx

from dcnv3_tvm.transform.gpu_padding import fuses_mlp, gemm_padding


@pytest.mark.parametrize(
    ("rows", "multiple"), [(50176, 128), (800, 64), (49, 64), (33, 16), (1, 16), (None, 128)]
)
def test_row_multiple_wastes_few_rows(rows, multiple):
    rows = tirx.Var("rows", "int64") if rows is None else rows
    assert gemm_padding(rows, 64).rows == multiple


@pytest.mark.parametrize(("depth", "multiple"), [(27, 16), (112, 16), (144, 32), (1024, 32)])
def test_short_depths_are_padded_to_one_fragment(depth, multiple):
    assert gemm_padding(64, depth).depth == multiple


def test_mlp_is_fused_where_memory_binds_two_kernels():
    rows = 64 * 56 * 56
    assert fuses_mlp(rows, 64, 256, 64)
    assert fuses_mlp(None, 128, 512, 128)
    assert not fuses_mlp(rows, 160, 640, 160)  # bound by arithmetic
    assert not fuses_mlp(rows, 64, 250, 64)  # partial slab of hidden features
    assert not fuses_mlp(56 * 56, 64, 256, 64)  # fewer row tiles than multiprocessors
