"""Use DCNv3 as an operator of Relax, TVM's graph language: build, print, lower, compile, run.

    python examples/graph_operator.py

Relax is the successor of Relay, which is no longer part of TVM.
"""

import argparse

import numpy as np
import tvm
from tvm import relax, tirx

from dcnv3_tvm import DCNv3Spec
from dcnv3_tvm.op import relax_op
from dcnv3_tvm.op.reference import dcnv3_reference


def build_graph(spec: DCNv3Spec) -> tvm.IRModule:
    """Build a graph of DCNv3 and a ReLU, with a dynamic batch."""
    batch = tirx.Var("n", "int64")
    x, offset, mask = (
        relax.Var(name, relax.TensorType((batch, *shape[1:]), spec.dtype))
        for name, shape in (
            ("x", spec.input_shape),
            ("offset", spec.offset_shape),
            ("mask", spec.mask_shape),
        )
    )
    builder = relax.BlockBuilder()
    with builder.function("main", [x, offset, mask]):
        with builder.dataflow():
            y = builder.emit(relax_op.dcnv3(x, offset, mask, group=spec.group))
            result = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(result)
    return builder.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=14, help="height and width (default: 14)")
    parser.add_argument("--target", default="llvm", help="TVM target (default: llvm)")
    arguments = parser.parse_args()

    # Step 1. Build the graph. The operator checks its arguments and infers the result's shape.
    spec = DCNv3Spec.of((2, arguments.size, arguments.size, 32), group=2)
    module = build_graph(spec)
    print("The graph as TVMScript:\n")
    print(module.script())

    # Step 2. Printed with metadata, the text can be parsed back into the same graph.
    parsed = relax_op.from_script(module.script(show_meta=True))
    tvm.ir.assert_structural_equal(parsed, module)

    # Step 3. Lower the graph. The operator becomes a call of a TensorIR kernel.
    lowered = relax.transform.LegalizeOps()(module)
    print("\nThe lowered graph:\n")
    print(lowered["main"].script())

    # Step 4. Compile and run it, and compare with the float64 reference.
    rng = np.random.default_rng(0)
    inputs = [
        rng.standard_normal(shape).astype(spec.dtype)
        for shape in (spec.input_shape, spec.offset_shape, spec.mask_shape)
    ]
    machine = relax.VirtualMachine(tvm.compile(module, target=arguments.target), tvm.cpu())
    result = machine["main"](*map(tvm.runtime.tensor, inputs)).numpy()
    expected = np.maximum(dcnv3_reference(*inputs, spec), 0)
    error = np.abs(result - expected).max() / np.abs(expected).max()
    print(f"\nCompiled and run with a batch of 2: relative error {error:.1e}")
    if not error < 1e-5:
        raise SystemExit("The result is wrong.")


if __name__ == "__main__":
    main()
