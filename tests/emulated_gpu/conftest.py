import ctypes
import tempfile
from pathlib import Path

import numpy as np
import pytest

from emulated_gpu import nvcc

HEADER = """
#include <cstdint>
#include <cuda.h>
#include <cuda_fp16.h>
typedef unsigned char uchar;
"""
SHARED_BYTES = 16384


class CompiledBody:
    """The body of a kernel with float arguments, compiled for the emulated GPU."""

    def __init__(self, prepared, folder, body, threads):
        begin = (
            f'extern "C" __global__ void __launch_bounds__({threads}) '
            "k(float* __restrict__ out, float* __restrict__ x) {"
        )
        code, path = folder / "k.cu", folder / "k.so"
        code.write_text(f"{HEADER}{begin}\n{body}\n}}\n")
        assert nvcc.main(prepared, ["--cubin", str(code), "-o", str(path)]) == 0
        self.threads = threads
        self.library = ctypes.CDLL(str(path))
        self.library.emulated_k.restype = ctypes.c_char_p

    def launch(self, out, x, *, blocks=1, backwards=0):
        """Run the kernel; return the error, or None."""
        config = (ctypes.c_uint * 7)(blocks, 1, 1, self.threads, 1, 1, SHARED_BYTES)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (out, x)]
        arguments = (ctypes.c_void_p * 2)(*map(ctypes.addressof, pointers))
        wrong = self.library.emulated_k(config, arguments, backwards)
        return None if wrong is None else wrong.decode()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    nvcc.prepare(folder)
    return folder


@pytest.fixture
def kernel(prepared, tmp_path):
    """Compile the body of a kernel with float arguments ``x`` and ``out``."""

    def compiled(body, threads):
        return CompiledBody(prepared, Path(tempfile.mkdtemp(dir=tmp_path)), body, threads)

    return compiled


@pytest.fixture
def run(kernel):
    """Compile the body of a kernel and run it with threads in both orders."""

    def call(body, x, count, *, threads=64, blocks=1):
        made = kernel(body, threads)
        x = np.ascontiguousarray(x, np.float32)
        results = []
        for backwards in (0, 1):
            results.append(np.full(count, np.nan, np.float32))
            wrong = made.launch(results[-1], x, blocks=blocks, backwards=backwards)
            if wrong is not None:
                return wrong
        return results

    return call
