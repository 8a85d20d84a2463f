import numpy as np
import pytest

from dcnv3_tvm.transform.lazy_array import LazyArray


def _double(array, calls):
    calls.append(array.shape)
    return 2 * array


def test_methods_compute_what_numpy_computes(rng):
    array = rng.standard_normal((2, 3, 4)).astype("float32")
    lazy = LazyArray.of(array).transpose(2, 0, 1).reshape(8, 3).transpose().astype("float16")
    expected = array.transpose(2, 0, 1).reshape(8, 3).T.astype("float16")
    assert (lazy.shape, lazy.ndim, lazy.size) == ((3, 8), 2, 24)
    assert (lazy.dtype, lazy.nbytes) == (np.dtype("float16"), 48)
    computed = np.asarray(lazy)
    np.testing.assert_array_equal(computed, expected)
    assert computed.flags.c_contiguous


def test_nothing_is_computed_early_or_kept():
    calls = []
    lazy = LazyArray(_double, np.ones(3), calls=calls).astype("float32")
    assert calls == []
    for times in (1, 2):
        np.testing.assert_array_equal(np.asarray(lazy), np.full(3, 2))
        assert len(calls) == times


def test_same_compares_functions_options_and_sources():
    ones, zeros = np.ones((2, 3)), np.zeros((2, 3))
    transposed = LazyArray.of(ones).transpose()
    assert transposed.same(LazyArray.of(ones.copy()).transpose())
    assert not transposed.same(LazyArray.of(zeros).transpose())
    assert not transposed.same(LazyArray.of(ones).reshape(3, 2))
    assert not transposed.same(transposed.astype("float32"))
    assert not transposed.same(LazyArray.of(ones.T))
    assert not LazyArray.of(ones).reshape(6).same(LazyArray.of(ones).reshape(6, 1))


def test_a_result_of_another_shape_is_an_error():
    with pytest.raises(AssertionError, match="computed shape"):
        np.asarray(LazyArray(np.transpose, np.ones((2, 3))))
