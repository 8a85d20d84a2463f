# %% [markdown]
r"""
# From the operator to machine code, step by step

The first two notebooks end where the article ends: at Python functions that compute DCNv3. This
one goes on. The same operator becomes a node of a graph, loops over arrays, scheduled loops, and
machine code for a processor and CUDA source for a GPU. At each step we run it, and compare it with
`dt.dcnv3`.

| step | the operator is | in |
|---|---|---|
| 1 | a node of a graph | Relax |
| 2 | loops over arrays, one block for each term of the equation | TensorIR |
| 3 | the same loops, split, reordered, fused, vectorised | TensorIR |
| 4 | instructions | LLVM, x86-64 |
| 5 | a kernel of threads | CUDA |
| 6 | a point under a roofline | |

The times are measured as the notebook runs. Those that you see here are of a virtual machine with
two cores, on which other programs kept both busy: read ratios, not milliseconds, and run it on
your machine.
"""

# %%
import ctypes
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tvm
from tvm import relax, s_tir, tirx

import dcnv3_tvm as dt
from dcnv3_tvm import machine
from dcnv3_tvm.bench.cpu_peaks import measure_peaks
from dcnv3_tvm.compiler.cuda import device_pipeline
from dcnv3_tvm.op import relax_op, tensorir
from dcnv3_tvm.runtime import library
from dcnv3_tvm.schedules.apply import schedule
from dcnv3_tvm.targets import resolve_target, vector_bits

# The input: by default that of the first stage of InternImage-T.
SHAPE = (1, 56, 56, 64)

# %%
spec = dt.DCNv3Spec.of(SHAPE, group=4)
rng = np.random.default_rng(0)
x = rng.standard_normal(spec.input_shape, np.float32)
offset = 2 * rng.standard_normal(spec.offset_shape, np.float32)
mask = rng.random(spec.mask_shape, np.float32)
expected = dt.dcnv3(x, offset, mask, group=4)
target = resolve_target("auto")
threads = library.default_threads()
library.use_threads(threads)  # TVM alone may take half as many
print(f"{machine.cpu_name()}, {threads} threads")
print(f"target: {target}")


def check(what: str, result: np.ndarray) -> None:
    """Compare with dt.dcnv3: largest difference, relative to the largest value."""
    difference = float(np.abs(result - expected).max() / np.abs(expected).max())
    print(f"{what}: {result.shape}, relative difference {difference:.0e}")
    assert difference < 1e-5


# %% [markdown]
r"""
## 1. A node of a graph

Relax is TVM's language for graphs. DCNv3 is one operator in it, `dcnv3_tvm.dcnv3`, with rules for
the type of its result, for layouts, mixed precision and gradients. Passes over the graph see one
call instead of the dozens that a decomposition into `grid_sample` gives.
"""

# %%
arguments = [
    relax.Var(name, relax.TensorType(shape, "float32"))
    for name, shape in (
        ("x", spec.input_shape),
        ("offset", spec.offset_shape),
        ("mask", spec.mask_shape),
    )
]
builder = relax.BlockBuilder()
with builder.function("main", arguments):
    builder.emit_func_output(builder.emit(relax_op.dcnv3(*arguments, group=4)))
graph = builder.get()
print(graph["main"].script())

executable = tvm.compile(graph, target=target)
main = relax.VirtualMachine(executable, tvm.cpu())["main"]
check("the graph", main(*map(tvm.runtime.tensor, (x, offset, mask))).numpy())

# %% [markdown]
r"""
## 2. Loops over arrays

`LegalizeOps` replaces the node by a call of a TensorIR function. This function has one *block* for
each term of the equation, in loops of its own, and an array between any two:

| block | term | what it computes |
|---|---|---|
| `offsets` | $\Delta p_{gk}$ | x and y, which are stored in pairs |
| `coordinates` | $s\,(p_k + \Delta p_{gk})$ | the sampling position, relative to $p$ |
| `corners` | | the first of the four pixels around it |
| `weights` | $m_{gk}$ times the bilinear weights | four factors |
| `pixels` | | the place of that pixel in $x$ |
| `sum` | $\sum_k \dots x_g(\dots)$ | the weighted sum, for each channel |
| `store` | $y$ | rounding to the type of the result |

`outline` prints the loops of a function and its blocks; the whole text of a block is longer.
"""


# %%
KINDS = {
    tirx.ForKind.SERIAL: "",
    tirx.ForKind.PARALLEL: "parallel ",
    tirx.ForKind.VECTORIZED: "vector ",
    tirx.ForKind.UNROLLED: "unrolled ",
    tirx.ForKind.THREAD_BINDING: "",
}


def outline(function: tirx.PrimFunc) -> str:
    """Return the loops and blocks of a function, a line for each nest of loops."""
    lines = []

    def visit(node: object, depth: int, loops: list[str]) -> None:
        if isinstance(node, tirx.For):
            kind = KINDS[tirx.ForKind(node.kind)]
            if node.thread_binding is not None:
                kind = f"{node.thread_binding.thread_tag} "
            visit(node.body, depth, [*loops, f"{kind}{node.extent.value}"])
        elif isinstance(node, s_tir.SBlockRealize):
            if node.block.name_hint == "root":
                visit(node.block.body, depth, [])
            else:
                lines.append("  " * depth + f"for {', '.join(loops)}:  {node.block.name_hint}")
        elif isinstance(node, tirx.SeqStmt):
            if loops:
                lines.append("  " * depth + f"for {', '.join(loops)}:")
            for part in node.seq:
                visit(part, depth + bool(loops), [])

    visit(function.body, 0, [])
    return "\n".join(lines)


lowered = relax.transform.LegalizeOps()(graph)
print(lowered["main"].script())
written = lowered["dcnv3"]
print(outline(written))
text = written.script()
start = text.index('with T.sblock("coordinates")')
print("\nThe first block:\n" + text[start : text.index("    for v", start)].rstrip())

# %% [markdown]
r"""
It runs as it is, in the order in which it is written. The arrays between the blocks have a value
for each point, or four: for one image of this size, this much memory:
"""

# %%
values = 9 * 4 * np.prod(spec.output_size)  # points of all groups
megabytes = {
    "positions, corners, index": 5 * values * 4 / 1e6,
    "weights": 4 * values * 4 / 1e6,
    "x and result": 2 * x.nbytes / 1e6,
    "offset and mask": (offset.nbytes + mask.nbytes) / 1e6,
}
print("\n".join(f"{name:26} {size:5.2f} MB" for name, size in megabytes.items()))


def compiled(function: tirx.PrimFunc) -> Callable[[], tvm.runtime.Tensor]:
    """Compile a kernel; return a call of it on our inputs, which returns its output."""
    kernel = tvm.compile(function.with_attr("global_symbol", "dcnv3"), target=target)["dcnv3"]
    out = np.full_like(expected, np.nan)
    tensors = [tvm.runtime.tensor(array) for array in (x, offset, mask, out)]

    def call() -> tvm.runtime.Tensor:
        kernel(*tensors)
        return tensors[-1]

    return call


steps = {"as written": compiled(written)}
check("as written", steps["as written"]().numpy())

# %% [markdown]
r"""
## 3. The schedule

A schedule changes how loops run and never what they compute: each of TVM's primitives checks that
the result stays the same. Here are the steps that matter most for this kernel on a CPU. We apply
them one after another and keep the function after each, to see what it is worth.

**Step 1: sum in registers.** As written, the sum of a channel is read and written for each point.
We compute it where it is stored, group by group, with the channels of the group in vector
registers and the loops over the points and the rows of four pixels unrolled.
"""

# %%
sch = s_tir.Schedule(written)
store, total = sch.get_sblock("store"), sch.get_sblock("sum")
batch, row, pixel, group, channel = sch.get_loops(store)
task = sch.fuse(batch, row)
sch.compute_at(total, group, preserve_unit_loops=True)
*_, point, two_rows, sum_channel = sch.get_loops(total)
sch.unroll(point)
sch.unroll(two_rows)
sch.vectorize(sum_channel)
sch.vectorize(channel)
steps["sum in registers"] = compiled(sch.mod["main"])
print(outline(sch.mod["main"]))

# %% [markdown]
r"""
**Step 2: one pixel at a time.** Position, corners, weights and index of *all* pixels go through
memory. Computed at the pixel that uses them, they stay in the first-level cache: the arrays shrink
to one pixel, 9 points of 4 groups.
"""

# %%
blocks = re.findall(r": +(\w+)$", outline(written), flags=re.MULTILINE)
stages = [name for name in reversed(blocks) if name not in ("sum", "store")]
print(stages)  # consumers before producers: a block moves to where its consumers are
for name in stages:
    sch.compute_at(sch.get_sblock(name), pixel, preserve_unit_loops=True)
steps["a pixel at a time"] = compiled(sch.mod["main"])
print(outline(sch.mod["main"]))

# %% [markdown]
r"""
**Step 3: points in vectors.** The arithmetic of positions and weights is the same for all nine
points of all groups: an instruction computes as many of them as a register has lanes.
"""

# %%
for name in stages:
    *_, groups, points = sch.get_loops(sch.get_sblock(name))
    sch.vectorize(sch.fuse(groups, points))
steps["points in vectors"] = compiled(sch.mod["main"])

# %% [markdown]
r"""
**Step 4: rows in parallel.** Each core takes rows of the image. That gains as much as the machine
has idle cores.

**Step 5: start sums outside.** In TensorIR, a sum sets its result to zero in its first iteration,
which is a question in each iteration. We take it out of the loop. (Last, because TVM can no longer
see then that the block is a sum, which it wants to see to move its loops.)
"""

# %%
sch.parallel(task)
steps["rows in parallel"] = compiled(sch.mod["main"])

init = sch.decompose_reduction(total, point)
sch.vectorize(sch.get_loops(init)[-1])
steps["start outside"] = compiled(sch.mod["main"])
print(outline(sch.mod["main"]))

# %% [markdown]
r"""
**The library's rule**, `schedules/cpu/dcnv3.py`, does these steps and some that are particular: it
fills whole registers with points where groups allow it, and separates the x and y of the offsets
by shuffles. What it decides can be decided otherwise: that is what a tuner searches.
"""

# %%
found = schedule(written, target)
steps["the library's rule"] = compiled(found.function)
print(f"rule: {found.rule}; what a tuner may choose instead:")
for decision, candidates in found.space.items():
    print(f"  {decision}: {candidates}")
print("\n" + outline(found.function) + "\n")

for name, call in steps.items():
    check(name, call().numpy())

# %% [markdown]
r"""
Now the times. Other programs disturb a measurement, so we take turns: a short burst of each
version, many rounds, and the median of each.
"""


# %%
def measure(calls: dict[str, Callable[[], object]], rounds: int = 25) -> dict[str, list[float]]:
    """Return the times of each call in seconds, measured in turns, one for each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # fills the caches
            start, count = time.perf_counter(), 0
            while count < 2 or time.perf_counter() - start < 0.005:
                call()
                count += 1
            times[name].append((time.perf_counter() - start) / count)
    return times


measured = measure(steps)
times = {name: statistics.median(rounds) for name, rounds in measured.items()}
before = times["as written"]
print(f"{'':18} {'median':>9} {'best':>9}   median, against the step before")
for name, seconds in times.items():
    best = min(measured[name])
    print(f"{name:18} {seconds * 1e3:6.3f} ms {best * 1e3:6.3f} ms   {before / seconds:.2f} times")
    before = seconds

figure, plot = plt.subplots(figsize=(8, 2.8), layout="constrained")
bars = plot.barh(list(times), [seconds * 1e3 for seconds in times.values()], label="median")
plot.bar_label(bars, fmt=" %.2f ms")
best = [min(rounds) * 1e3 for rounds in measured.values()]
plot.plot(best, list(times), "k|", markersize=16, label="best")
plot.legend()
plot.set(xlabel="ms", title="time after each step of the schedule")
plot.margins(x=0.15)
plot.invert_yaxis()
plt.show()

# %% [markdown]
r"""
The order matters for the gains, not for the end: what a step is worth depends on what the steps
before it left.

## 4. LLVM and x86-64

TVM hands the loops to LLVM, which writes the machine code. The part that matters is the sum: for
each point, four multiply-adds of whole vectors of channels, one for each of the pixels around it,
with a weight that one load spreads over all lanes.
"""

# %%
scheduled = found.function.with_attr("global_symbol", "dcnv3")
module = tvm.compile(scheduled, target=target).mod
llvm, assembly = module.inspect_source("ll"), module.inspect_source("s")
print(f"{len(llvm.splitlines())} lines of LLVM, {len(assembly.splitlines())} of assembly\n")

vectors = [line for line in llvm.splitlines() if re.search(r"f(mul|add).*<16 x float>", line)]
print("LLVM:\n" + "\n".join(vectors[:8]) + "\n")

register = {512: "zmm", 256: "ymm", 128: "xmm"}[vector_bits(target)]
lines = [line.strip().replace("\t", " ") for line in assembly.splitlines()]
adds = [n for n, line in enumerate(lines) if re.match("v?fmadd", line) and register in line]
densest = max(adds, key=lambda start: sum(start <= number < start + 14 for number in adds))
print("x86-64:\n  " + "\n  ".join(lines[densest : densest + 14]))
print(f"\n{len(adds)} multiply-adds of {register} registers")
assert len(adds) >= 9 * 4

# %% [markdown]
r"""
## 5. CUDA

A GPU needs another variant: pixels are loaded in vectors of four channels, positions and weights
stay in registers, and the loops become blocks of threads. The TensorIR is from the same
definition, `vector_loads=True`; another rule schedules it. TVM writes CUDA source, for which no
GPU and no CUDA compiler is needed.
"""

# %%
gpu = resolve_target("cuda-sm90")
kernel = schedule(tensorir.dcnv3(spec, vector_loads=True), gpu).function
print(outline(kernel) + "\n")
with device_pipeline.lowering():
    module = tvm.compile(
        tvm.IRModule({"dcnv3": kernel}), target=gpu, tir_pipeline=device_pipeline.PIPELINE
    )
(source,) = device_pipeline.cuda_sources(module.mod)
code = source[source.rindex('extern "C" __global__') :]
shown = [line if len(line) < 150 else line[:147] + "..." for line in code.splitlines()]
print("\n".join(shown[:32]) + "\n  ... eight more points\n" + "\n".join(shown[-3:]))

# %% [markdown]
r"""
Does this source compute DCNv3? Without a GPU we can still ask: the kernel is C++ but for a few
words. Twelve lines give these words a meaning on a processor, one thread after another. (That
works here because no thread waits for another. The library's tests run all kernels on an emulated
GPU, with barriers and shuffles.)
"""

# %%
WORDS = """
#include <algorithm>
#include <cmath>
#include <cstdint>
using std::min; using std::max; typedef unsigned int uint;
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x = 0, y = 0, z = 0; };
static Index blockIdx, threadIdx;
#define __global__
#define __launch_bounds__(...)
"""
LAUNCH = """
extern "C" void launch(int blocks, int threads, float* x, float* offset, float* mask, float* out) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) dcnv3_kernel(ARGUMENTS);
}
"""
order = re.findall(r"float\* __restrict__ (\w+)_ptr", code.partition("{")[0])
extents = {tag: int(size) for tag, size in re.findall(r"(\w+Idx\.\w) (\d+)", outline(kernel))}
print(extents)
assert set(extents) <= {"blockIdx.x", "blockIdx.y", "threadIdx.x"}
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "kernel"
    launcher = LAUNCH.replace("ARGUMENTS", ", ".join(order))
    path.with_suffix(".cpp").write_text(WORDS + code + launcher)
    subprocess.run(
        [
            "g++",
            "-O1",
            "-shared",
            "-fPIC",
            "-fno-strict-aliasing",
            f"{path}.cpp",
            "-o",
            f"{path}.so",
        ],
        check=True,
    )
    launch = ctypes.CDLL(f"{path}.so").launch
result = np.full_like(expected, np.nan)
pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, offset, mask, result)]
launch(extents["blockIdx.x"], extents["threadIdx.x"], *pointers)
check("the CUDA source", result)

# %% [markdown]
r"""
## 6. On a roofline

How fast could it be? Two things bound it: the arithmetic the processor can do, and the bytes that
must come from memory and go there. With $F$ operations and $B$ bytes, peak rates $P$ and $M$:

$$
t \ge \max\left( \frac{F}{P}, \frac{B}{M} \right), \qquad
\frac{F}{t} \le \min\left( P,\; \frac{F}{B} M \right)
$$

$F/B$ is the arithmetic intensity. The sampling has $F = 8 K$ operations for each value of the
result, and reads $x$, offset and mask and writes $y$ once: $B$ is the sum of their sizes. The
peaks are measured here: multiply-adds in registers, and the copy of an array larger than the
caches.
"""

# %%
peaks = measure_peaks(threads)
F, B = spec.flops, spec.bytes
assert 8 * 9 * expected.size == F
assert sum(array.nbytes for array in (x, offset, mask, expected)) == B
bound = max(F / peaks.flops, B / peaks.bytes)
print(f"{F / 1e6:.1f} MFLOP, {B / 1e6:.2f} MB: {F / B:.1f} FLOP per byte")
print(f"peaks in {threads} threads: {peaks.flops / 1e9:.0f} GFLOP/s, {peaks.bytes / 1e9:.0f} GB/s")
seconds = times["the library's rule"]
print(f"bound {bound * 1e3:.3f} ms, measured {seconds * 1e3:.3f} ms")

figure, plot = plt.subplots(figsize=(8, 4.2), layout="constrained")
intensity = np.logspace(-1, 2.5, 100)
roof = np.minimum(peaks.flops, intensity * peaks.bytes)
plot.loglog(intensity, roof / 1e9, "k", label="roofline")
for index, (name, seconds) in enumerate(times.items()):
    plot.plot(F / B, F / seconds / 1e9, "o", color=f"C{index}", label=name)
plot.axvline(F / B, color="gray", linewidth=0.5)
plot.set(
    xlabel="operations per byte",
    ylabel="GFLOP/s",
    title="the operator after each step of the schedule",
)
plot.legend(loc="lower right")
plt.show()

# %% [markdown]
r"""
The flat part of the roof is a bound always. The sloped part is one for arrays that come from
memory: all of ours have 3 MB together, and stay in a cache between two calls, so that a point may
lie above it.

What is missing to the roof is what the count leaves out: positions, weights and indices of each
point, which serve only the 16 channels of a group, and the loads of four pixels for each point
from places that are known only when they are needed.

`dcnv3-tvm bench kernels` gives such a bound for each kernel of a model, `dcnv3-tvm explain` the
rule and the scheduled function, and [tuning](../docs/tuning.md) searches the decisions that step 3
printed.
"""
