"""The one table of environment variables that matter to this library."""

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
        As it is set in the shell.
    reader : str
        Who reads it.
    meaning : str
        What it does, in one sentence.
    """

    name: str
    reader: str
    meaning: str

    @property
    def value(self) -> str | None:
        """The present value; None when it is not set."""
        return os.environ.get(self.name)


TVM_NUM_THREADS: Final = Variable(
    "TVM_NUM_THREADS",
    "TVM and this library",
    "Threads of a compiled model; unset means the physical cores this process may use.",
)
OMP_NUM_THREADS: Final = Variable(
    "OMP_NUM_THREADS",
    "TVM, PyTorch and this library",
    "The same where TVM_NUM_THREADS is not set.",
)
TVM_BIND_THREADS: Final = Variable(
    "TVM_BIND_THREADS",
    "TVM",
    "0 keeps its threads from being pinned to cores.",
)
GOMP_SPINCOUNT: Final = Variable(
    "GOMP_SPINCOUNT",
    "PyTorch's OpenMP",
    "10000, set before PyTorch is imported, keeps its idle threads from slowing TVM's down.",
)
OMP_WAIT_POLICY: Final = Variable(
    "OMP_WAIT_POLICY",
    "PyTorch's OpenMP",
    "PASSIVE does the same for TVM, but can slow PyTorch's small operations down.",
)
TVM_LIBRARY_PATH: Final = Variable(
    "TVM_LIBRARY_PATH",
    "TVM and this library",
    "A folder searched first for libtvm_runtime.",
)
CUDA_HOME: Final = Variable(
    "CUDA_HOME",
    "PyTorch and this library",
    "The folder of the CUDA toolkit, whose bin/nvcc compiles kernels for GPUs.",
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
    TVM_BACKTRACE,
)
"""Every variable, in the order the command line shows them."""
