"""State of the caches before a kernel is timed on a CPU."""

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi

from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.tuning import cpu_caches


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "int64"])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (33, 65)])
def test_arguments_keep_their_values(rng, dtype, shape):
    cpu_caches.register()
    arrays = [rng.standard_normal(shape).astype(dtype) for _ in range(2)]
    given = [tensors.to_kernel(array.copy()) for array in arrays]
    tvm_ffi.get_global_func(cpu_caches.PREPARE)(*given)
    for tensor, array in zip(given, arrays, strict=True):
        np.testing.assert_array_equal(tensors.to_numpy(tensor), array)


def test_first_argument_is_written_by_every_thread():
    """The compiler does not remove stores of the values that memory holds already."""
    rewrite = cpu_caches._rewrite()
    tensor = tvm.runtime.tensor(np.arange(99, dtype="uint8"))
    rewrite(tensor, 1)
    np.testing.assert_array_equal(tensor.numpy(), np.arange(99, dtype="uint8") ^ 1)
