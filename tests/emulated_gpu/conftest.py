import ctypes

import numpy as np
import pytest

from emulated_gpu import build_driver, nvcc

HEADER = """
#include <cstdint>
#include <cuda.h>
#include <cuda_fp16.h>
typedef unsigned char uchar;
"""
SHARED_BYTES = 16384


class CompiledBody:
    """The body of a kernel with float arguments, compiled for the emulated GPU."""

    def __init__(self, prepared, folder, body, threads, options=()):
        bounds = f"__launch_bounds__({threads}) " if threads else ""
        begin = (
            f'extern "C" __global__ void {bounds}'
            "k(float* __restrict__ out, float* __restrict__ x) {"
        )
        code, path = folder / "k.cu", folder / "k.so"
        code.write_text(f"{HEADER}{begin}\n{body}\n}}\n")
        assert nvcc.main(prepared, ["--cubin", *options, str(code), "-o", str(path)]) == 0
        self.threads, self.path = threads, path
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


@pytest.fixture(scope="session")
def compiled(prepared, tmp_path_factory):
    """Compile the body of a kernel with float arguments ``x`` and ``out``."""

    def compile_body(body, threads, options=()):
        folder = tmp_path_factory.mktemp("body")
        return CompiledBody(prepared, folder, body, threads, options)

    return compile_body


@pytest.fixture
def run(compiled):
    """Compile the body of a kernel and run it with threads in both orders."""

    def call(body, x, count, *, threads=64, blocks=1, options=()):
        made = compiled(body, threads, options)
        x = np.ascontiguousarray(x, np.float32)
        results = []
        for backwards in (0, 1):
            results.append(np.full(count, np.nan, np.float32))
            wrong = made.launch(results[-1], x, blocks=blocks, backwards=backwards)
            if wrong is not None:
                return wrong
        return results

    return call


class Driver:
    """The emulated driver in this process, under a name that nothing else loads."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def __getattr__(self, name):
        return getattr(self.library, name)

    def create(self, function, *arguments):
        """Call a function that stores a handle; return the handle."""
        made = ctypes.c_void_p()
        assert getattr(self.library, function)(ctypes.byref(made), *arguments) == 0
        return made.value

    def function(self, kernel):
        """Load a compiled kernel."""
        module = self.create("cuModuleLoadData", kernel.path.read_bytes())
        return self.create("cuModuleGetFunction", ctypes.c_void_p(module), b"k")

    def array(self, values):
        """Return the address of new memory of the GPU, and an array on it."""
        values = np.asarray(values, np.float32)
        memory = self.create("cudaMalloc", ctypes.c_size_t(values.nbytes))
        on_gpu = np.ctypeslib.as_array((ctypes.c_float * values.size).from_address(memory))
        on_gpu[:] = values
        return memory, on_gpu

    def launch(self, function, out, x, stream=0, *, threads=64, shared=0):
        """Launch a kernel with the arguments (out, x); return the error."""
        config = LaunchConfig((1, 1, 1), (threads, 1, 1), shared, stream, None, 0)
        addresses = [ctypes.c_void_p(each) for each in (out, x)]
        arguments = (ctypes.c_void_p * 2)(*map(ctypes.addressof, addresses))
        return self.library.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function), arguments, None
        )

    def copy(self, to, source, count, kind, stream=0):
        """Copy numbers; return the error."""
        pointers = [ctypes.c_void_p(each) for each in (to, source)]
        size, stream = ctypes.c_size_t(4 * count), ctypes.c_void_p(stream)
        return self.library.cudaMemcpyAsync(*pointers, size, kind, stream)

    def synchronize(self, stream):
        return self.library.cudaStreamSynchronize(ctypes.c_void_p(stream))

    def wait(self, stream, other):
        """Let the later work of a stream wait for the present work of another."""
        event = ctypes.c_void_p(self.create("cudaEventCreate"))
        assert self.library.cudaEventRecord(event, ctypes.c_void_p(other)) == 0
        assert self.library.cudaStreamWaitEvent(ctypes.c_void_p(stream), event, 0) == 0

    def error(self):
        text = ctypes.c_char_p()
        self.library.cuGetErrorName(1, ctypes.byref(text))
        return text.value.decode()


class LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "emulated.so"
    build_driver(path, "emulated.so")
    return Driver(path)
