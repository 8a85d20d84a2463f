"""Layouts of the tensor-core intrinsics, compared with a model of the instructions.

The model follows ``ldmatrix`` and ``mma.m16n8k16`` in NVIDIA's PTX manual. Tests of the rules run
the loops that the intrinsics replace; these check that the instructions compute the same.
"""

import numpy as np
import pytest

from dcnv3_tvm.schedules.gpu import tensor_core

STRIDE = 40


def ldmatrix(shared, addresses):
    """Return the registers of a warp after ``ldmatrix.x4``: four 8x8 matrices."""
    registers = np.zeros((32, 8))
    for matrix in range(4):
        rows = [
            shared[addresses[8 * matrix + row] : addresses[8 * matrix + row] + 8]
            for row in range(8)
        ]
        for thread in range(32):
            for half in range(2):
                registers[thread, 2 * matrix + half] = rows[thread // 4][thread % 4 * 2 + half]
    return registers


def mma(a, b, c):
    """Return the registers of the sums after ``mma.m16n8k16``."""
    first, second, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for thread in range(32):
        group, member = divmod(thread, 4)
        for i in range(8):
            row = group + (8 if i in (2, 3, 6, 7) else 0)
            first[row, member * 2 + i % 2 + (8 if i >= 4 else 0)] = a[thread, i]
        for i in range(4):
            second[member * 2 + i % 2 + (8 if i >= 2 else 0), group] = b[thread, i]
            sums[group + (8 if i >= 2 else 0), member * 2 + i % 2] = c[thread, i]
    sums += first @ second
    out = np.zeros((32, 4))
    for thread in range(32):
        group, member = divmod(thread, 4)
        for i in range(4):
            out[thread, i] = sums[group + (8 if i >= 2 else 0), member * 2 + i % 2]
    return out


def spread(matrix, place):
    registers = np.zeros((32, 8))
    for row in range(16):
        for column in range(16):
            registers[place(row, column)] = matrix[row, column]
    return registers


@pytest.mark.parametrize(
    ("address", "place"),
    [
        (tensor_core.row_address, tensor_core.fragment),
        (tensor_core.transposed_row_address, tensor_core.transposed_fragment),
    ],
    ids=["first", "second"],
)
def test_load_follows_the_layout(address, place, rng):
    tile = rng.standard_normal((16, 16))
    shared = np.full(16 * STRIDE, np.nan)
    for row in range(16):
        shared[row * STRIDE : row * STRIDE + 16] = tile[row]
    loaded = ldmatrix(shared, [address(thread, STRIDE) for thread in range(32)])
    np.testing.assert_array_equal(loaded, spread(tile, place))


def test_two_instructions_multiply_fragments(rng):
    first, second, sums = (rng.standard_normal((16, 16)) for _ in range(3))
    a = spread(first, tensor_core.fragment)
    b = spread(second, tensor_core.transposed_fragment)
    c = spread(sums, tensor_core.fragment)
    for half in range(2):
        part = slice(4 * half, 4 * half + 4)
        c[:, part] = mma(a, b[:, part], c[:, part])
    expected = spread(sums + first @ second.T, tensor_core.fragment)
    np.testing.assert_allclose(c, expected, rtol=1e-12, atol=1e-12)


def test_padded_rows_have_no_bank_conflicts():
    """Eight rows of 16 bytes are read at once, from 32 banks of 4 bytes."""
    for step in (1, 2, 5, 7):
        stride = (step * 16 + 8) * 2
        banks = [(row * stride // 4 + word) % 32 for row in range(8) for word in range(4)]
        assert len(set(banks)) == 32
