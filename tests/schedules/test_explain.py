import dcnv3_tvm as dt
from dcnv3_tvm.compiler.explain import launch, verdicts
from dcnv3_tvm.kernels.layer_norm import layer_norm
from dcnv3_tvm.schedules import CPU_RULES, GPU_RULES, apply_rules
from dcnv3_tvm.targets import resolve_target
from helpers.gpu_kernels import gemm

SPEC = dt.DCNv3Spec.of((64, 56, 56, 64), group=4, dtype="float16")
GPU = resolve_target("cuda-sm90")


def test_operator_on_gpu():
    found = dt.explain(SPEC, "cuda-sm90")
    assert found.rule == "dcnv3"
    assert [verdict.rule for verdict in found.verdicts] == [rule.__name__ for rule in GPU_RULES]
    assert sum(verdict.taken for verdict in found.verdicts) == 1
    assert "  * dcnv3: " in str(found)
    assert "6272 blocks of 2 x 64 threads" in str(found)


def test_operator_with_dynamic_shape_on_gpu():
    spec = dt.DCNv3Spec.of((None, None, 48, 64), group=4, dtype="float16")
    found = dt.explain(spec, "cuda-sm90")
    assert found.rule == "dcnv3"
    assert found.launch == "(n * height) x 3 blocks of 128 threads"


def test_dynamic_batch_needs_one_grid_axis():
    """The second grid axis has at most 65535 blocks, too few for a large image."""
    spec = dt.DCNv3Spec.of((None, 2048, 2048, 512), group=32, dtype="float16")
    launch = dt.explain(spec, "cuda-sm90").launch
    assert launch.startswith("(n * ")
    assert " x " not in launch.split(" blocks")[0]


def test_operator_on_cpu():
    found = dt.explain(dt.DCNv3Spec.of((1, 8, 8, 32), group=2), "cpu-znver4")
    assert found.rule == "dcnv3"
    assert len(found.verdicts) == len(CPU_RULES)
    assert found.launch == ""
    assert "launch" not in str(found)


def test_rules_name_their_reason():
    kernel = apply_rules(gemm((256,), 64, 64, dtype="float16"), GPU)
    first, second, *rest = verdicts(kernel, GPU)
    assert (first.rule, first.taken) == ("dcnv3", False)
    assert first.reason == "schedules kernels 'dcnv3' and 'dcnv3_packed'; this is 'gemm'"
    assert (second.rule, second.taken) == ("gemm", True)
    assert {verdict.reason for verdict in rest} == {"not tried: gemm applies"}
    assert launch(kernel.function).endswith("threads")


def test_reason_names_the_value_that_is_too_large():
    kernel = apply_rules(layer_norm((3,), 16 * 12289, eps=1e-6), GPU)
    assert kernel.rule == "fallback"
    assert kernel.refusals["layer_norm"] == (
        "keeps at most 128 elements of a row in the registers of a thread; "
        "196624 channels need 49156"
    )
