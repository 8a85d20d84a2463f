"""Every kernel of every released variant, at its own resolution, is taken by the rule meant for it.

The kernels are built from the variants' sizes: G alone would take 12 GB to import.
"""

import pytest
import tvm

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.variant_kernels import variant_kernels
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.targets import resolve_target


@pytest.mark.parametrize("variant", frontend.list_models("internimage_*"))
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("cpu-znver4", "float32"), ("cpu-znver4", "bfloat16"), ("cpu-haswell", "float32")],
)
def test_every_kernel_has_its_rule(variant, name, dtype):
    target = resolve_target(name)
    wanted, functions = {}, {}
    for kernel in variant_kernels(variant, target, dtype):
        wanted[kernel.name] = kernel.rule
        functions[kernel.name] = kernel.function.with_attr("global_symbol", kernel.name)
    module, rules = schedule_module(tvm.IRModule(functions), target)
    assert len(wanted) == 4 * 9 + 1
    assert {name: found.rule for name, found in rules.items()} == wanted
    assert all("T.parallel" in module[kernel].script() for kernel in functions)
