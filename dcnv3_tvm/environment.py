"""Table of the environment variables that affect this library."""

from __future__ import annotations

import dataclasses
import os
from typing import Final


@dataclasses.dataclass(frozen=True)
class Variable:
    """An environment variable.

    Parameters
    ----------
    name : str
        Its name.
    reader : str
        The software that reads it.
    meaning : str
        Its effect, in one sentence.
    """

    name: str
    reader: str
    meaning: str

    @property
    def value(self) -> str | None:
        """The current value; None if not set."""
        return os.environ.get(self.name)


TVM_NUM_THREADS: Final = Variable(
    "TVM_NUM_THREADS",
    "TVM and this library",
    "Threads of a compiled model; default: the physical cores available to this process.",
)
OMP_NUM_THREADS: Final = Variable(
    "OMP_NUM_THREADS",
    "TVM, PyTorch and this library",
    "As TVM_NUM_THREADS, if that is not set.",
)
TVM_BIND_THREADS: Final = Variable(
    "TVM_BIND_THREADS",
    "TVM",
    "0 disables pinning of its threads to cores.",
)
GOMP_SPINCOUNT: Final = Variable(
    "GOMP_SPINCOUNT",
    "PyTorch's OpenMP",
    "10000, set before PyTorch is imported, stops its idle threads from slowing TVM's down.",
)
OMP_WAIT_POLICY: Final = Variable(
    "OMP_WAIT_POLICY",
    "PyTorch's OpenMP",
    "PASSIVE has the same effect, but can slow PyTorch's small operations down.",
)
TVM_LIBRARY_PATH: Final = Variable(
    "TVM_LIBRARY_PATH",
    "TVM and this library",
    "Folder searched first for libtvm_runtime.",
)
CUDA_HOME: Final = Variable(
    "CUDA_HOME",
    "PyTorch and this library",
    "Folder of the CUDA toolkit, whose bin/nvcc compiles GPU kernels.",
)
CXX: Final = Variable(
    "CXX",
    "many programs and this library",
    "C++ compiler that links compiled models, if it is for their system.",
)
DCNV3_TVM_CACHE: Final = Variable(
    "DCNV3_TVM_CACHE",
    "this library",
    "Folder of compiled operators; default: dcnv3-tvm in XDG_CACHE_HOME or ~/.cache; off disables.",
)
XDG_CACHE_HOME: Final = Variable(
    "XDG_CACHE_HOME",
    "many programs and this library",
    "Folder of caches, if DCNV3_TVM_CACHE is not set.",
)
TVM_BACKTRACE: Final = Variable(
    "TVM_BACKTRACE", "TVM", "1 shows TVM's own backtrace when TVM fails."
)

VARIABLES: Final = (
    TVM_NUM_THREADS,
    OMP_NUM_THREADS,
    TVM_BIND_THREADS,
    GOMP_SPINCOUNT,
    OMP_WAIT_POLICY,
    TVM_LIBRARY_PATH,
    CUDA_HOME,
    CXX,
    DCNV3_TVM_CACHE,
    XDG_CACHE_HOME,
    TVM_BACKTRACE,
)
"""All variables, in the order that the command line prints."""
