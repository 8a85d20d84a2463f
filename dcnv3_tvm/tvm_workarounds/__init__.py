"""Defects of TVM, and the code that exists only because of them.

`DEFECTS` describes those seen in apache-tvm 0.27.0.post1 with apache-tvm-ffi 0.1.14. The modules
of this package hold the workarounds that are functions: `device_passes`, `device_code` and
`host_passes` need TVM's compiler, `process` does not. A workaround that has to stay where it is,
such as a line of a schedule, has a comment ``See tvm_workarounds: NAME``. Converters of the PyTorch
importer that TVM lacks or gets wrong are in `dcnv3_tvm.frontend.torch.converters`, one comment
each.

When the TVM version changes, check each entry and delete what is fixed.
"""

from collections.abc import Mapping
from typing import Final

DEFECTS: Final[Mapping[str, str]] = {
    # Relax and targets
    "script-metadata": "A printed module holds the result type of a registered operator in its "
    "metadata; its parser creates symbolic variables there that are not the function's.",
    "ffi-errors": "An exception of Python that passes through C++ keeps only its message.",
    "unknown-cpu": "For a CPU that LLVM does not know, TVM prints a warning and builds generic "
    "code.",
    # TensorIR
    "libm-calls": "For LLVM targets, exp and erf become one call of the C library per element.",
    "bfloat16-operands": "BF16ComputeLegalize converts the bfloat16 operands of an LLVM intrinsic "
    "to float32.",
    "bfloat16-rounding": "A conversion to bfloat16 becomes six integer instructions, even where "
    "the processor has one for it.",
    "vector-sum": "No operation adds the elements of a vector; halving it goes through memory. A "
    "call of an LLVM intrinsic cannot set the flag reassoc.",
    "constant-comparison": "Code generation fails on a vector of comparisons of constants.",
    "dynamic-extents": "With dynamic extents, TVM cannot prove how much of a buffer a thread "
    "accesses, or that a block is a plain reduction.",
    "stack-buffers": "LowerTVMBuiltin allocates buffers of CPU kernels on the stack only below "
    "1 KiB and in the scope global. For the others each task calls the runtime, which may take "
    "longer than its work.",
    "unit-extent-guard": "If the extent of an axis is 1, the guard of threads beyond it is "
    "removed; they would store as well.",
    "transformed-layout": "A block with a transformed layout is not recognized as complete, and "
    "cannot be moved afterwards.",
    "cache-write-bounds": "A write cache of a part of an output loses the bounds check: after "
    "tiling, or if the output has more dimensions than the block and the only thread block is "
    "partial.",
    "shared-memory-barrier": "ThreadSync omits the barrier between a store to shared memory and a "
    "load of the same element with another thread axis in its index.",
    "allreduce-copies": "LowerCrossThreadReduction cannot lower two unrolled copies of a "
    "reduction.",
    "warp-in-place": "StorageRewrite lets an element-wise result take the memory of a buffer of "
    "scope warp, such as that of a softmax over one point; LowerWarpMemory then fails.",
    "warp-vectors": "VectorizeLoop leaves buffers of scope warp scalar.",
    # Lowering for GPUs
    "lower-warp-memory": "LowerWarpMemory lowers one buffer of scope warp per run and leaves those "
    "allocated after it (as in https://github.com/apache/tvm/issues/5366). It also fails if "
    "CommonSubexprElim or loop unrolling has hidden which index is the thread's.",
    "tail-guards": "Where the last thread block is partial, every statement of a kernel gets a "
    "guard of its own with the same condition, and no pass merges them. nvcc does not always; "
    "then loads wait for the branch before them.",
    "copy-offset": "The function that copies asynchronously from global memory takes the offset "
    "of the source as int, so elements beyond 2**31 are read from a negative address.",
    "cuda-source": "CUDA source is compiled at build time only if TVM's runtime finds a GPU, and "
    "for that GPU. Otherwise the library holds source that is compiled when it is loaded. There "
    "is no option to compile for the target's architecture.",
    # Runtime
    "ffi-torch": "Importing tvm_ffi imports PyTorch wherever it is installed, which takes a second "
    "and 200 MB. PyTorch tensors are accepted without it if PyTorch is imported later.",
    "ffi-json": "TVM 0.27 with apache-tvm-ffi 0.1.15 crashes when it reads or writes JSON.",
    "thread-pool-fork": "A forked child inherits the thread pool of the thread that forked, but "
    "no threads: calls wait for them for ever; the exit does too, or aborts, and so does resetting "
    "the pool. Mutexes that other threads held in TVM stay locked.",
    "thread-pool-size": "The maximum size of a thread pool is fixed when it is created, from the "
    "environment; no packed function sets it, only the C++ function SetMaxConcurrency.",
    "thread-pool-default": "The default number of threads is half of the logical cores, also on "
    "processors with one thread per core.",
    "thread-pool-affinity": "The thread pool pins each worker to a core, but not the calling "
    "thread, which may run on a worker's core while another core is idle, for up to 0.5 s.",
    "cuda-last-error": "After a failed CUDA call, TVM does not clear the error that CUDA keeps for "
    "the thread; the next caller of cudaGetLastError, such as PyTorch, takes it for its own.",
    "cuda-teardown": "After a fault on a GPU, the destructors of captured graphs and of device "
    "memory throw, which ends the process.",
    "cuda-current-device": "TVM changes the thread's current CUDA device and does not restore it; "
    "and launching a captured CUDA graph does not select its device.",
}
"""Description of each defect, by the name that comments refer to."""
