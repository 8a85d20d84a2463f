"""The layouts of tensor core instructions, against a model of the instructions themselves.

The model follows the descriptions of ``ldmatrix`` and ``mma.m16n8k16`` in NVIDIA's PTX manual. That
a rule's loops are right is shown elsewhere, by running them; here that the instructions do what
those loops say.
"""

import numpy as np
import pytest

from dcnv3_tvm.schedules.gpu import tensor_core

STRIDE = 40


def ldmatrix(shared, addresses):
    """Registers of 32 threads after ``ldmatrix.x4``: four 8x8 matrices, eight elements a thread."""
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
    """Registers of the sums after ``mma.m16n8k16``, for eight, four and four elements a thread."""
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
def test_a_load_puts_every_element_where_the_layout_says(address, place, rng):
    tile = rng.standard_normal((16, 16))
    shared = np.full(16 * STRIDE, np.nan)
    for row in range(16):
        shared[row * STRIDE : row * STRIDE + 16] = tile[row]
    loaded = ldmatrix(shared, [address(thread, STRIDE) for thread in range(32)])
    np.testing.assert_array_equal(loaded, spread(tile, place))


def test_two_instructions_multiply_two_tiles(rng):
    first, second, sums = (rng.standard_normal((16, 16)) for _ in range(3))
    a = spread(first, tensor_core.fragment)
    b = spread(second, tensor_core.transposed_fragment)
    c = spread(sums, tensor_core.fragment)
    for half in range(2):
        part = slice(4 * half, 4 * half + 4)
        c[:, part] = mma(a, b[:, part], c[:, part])
    expected = spread(sums + first @ second.T, tensor_core.fragment)
    np.testing.assert_allclose(c, expected, rtol=1e-12, atol=1e-12)


def test_eight_rows_lie_in_different_banks():
    """Rows of a fragment are read eight at a time: 32 banks of 4 bytes, 16 bytes a row."""
    for step in (1, 2, 5, 7):
        stride = (step * 16 + 8) * 2
        banks = [(row * stride // 4 + word) % 32 for row in range(8) for word in range(4)]
        assert len(set(banks)) == 32
