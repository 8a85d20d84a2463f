import dcnv3_tvm as dt
from dcnv3_tvm.kernels.gemm import gemm
from dcnv3_tvm.schedules import CPU_RULES, GPU_RULES
from dcnv3_tvm.schedules.explain import explain, launch
from dcnv3_tvm.targets import resolve_target

SPEC = dt.DCNv3Spec.of((64, 56, 56, 64), group=4, dtype="float16")


def test_the_operator_on_a_gpu():
    found = dt.explain(SPEC, "cuda-sm90")
    assert found.rule == "dcnv3"
    assert [verdict.rule for verdict in found.verdicts] == [rule.__name__ for rule in GPU_RULES]
    assert sum(verdict.taken for verdict in found.verdicts) == 1
    assert "  * dcnv3: A block takes a run of pixels" in str(found)
    assert "6272 blocks of 2 x 64 threads" in str(found)


def test_open_sizes_on_a_gpu():
    spec = dt.DCNv3Spec.of((None, None, 48, 64), group=4, dtype="float16")
    found = dt.explain(spec, "cuda-sm90")
    assert found.rule == "dcnv3"
    assert found.launch == "(n * height) x 3 blocks of 128 threads"


def test_an_open_batch_needs_no_second_axis():
    """Of which there would be too few blocks for a large image."""
    spec = dt.DCNv3Spec.of((None, 2048, 2048, 512), group=32, dtype="float16")
    launch = dt.explain(spec, "cuda-sm90").launch
    assert launch.startswith("(n * ")
    assert " x " not in launch.split(" blocks")[0]


def test_the_operator_on_a_cpu():
    found = dt.explain(dt.DCNv3Spec.of((1, 8, 8, 32), group=2), "cpu-znver4")
    assert found.rule == "dcnv3"
    assert len(found.verdicts) == len(CPU_RULES)
    assert found.launch == ""
    assert "launch" not in str(found)


def test_rules_before_the_one_that_takes_it_say_why_not():
    target = resolve_target("cuda-sm90")
    verdicts, scheduled = explain(gemm((256,), 64, 64, dtype="float16"), target)
    first, second, *rest = verdicts
    assert (first.rule, first.taken) == ("dcnv3", False)
    assert first.reason == "it schedules other kernels"
    assert (second.rule, second.taken) == ("gemm", True)
    assert all("not asked" in verdict.reason for verdict in rest)
    assert launch(scheduled).endswith("threads")
