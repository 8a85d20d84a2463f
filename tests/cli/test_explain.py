MODEL = ("explain", "test_internimage_pre_norm", "--size", "64x64", "--target")


def test_text_lists_reasons_once_per_group(cli):
    found = cli(*MODEL, "cpu-skylake-avx512", "--dtype", "bfloat16", "--quiet")
    assert found.code == 0
    assert found.err.startswith("dcnv3-tvm explain: warning: bfloat16 gains nothing on cpu-skylake")
    assert found.err.endswith(": compiling in float32\n")
    assert "dcnv3: schedules kernels 'dcnv3' and 'dcnv3_packed'; this is 'matmul'" in found.out
    assert found.out.count("  * matmul: ") == 1


def test_json_holds_a_verdict_of_every_rule(cli):
    found = cli(*MODEL, "cuda-sm90", "--dtype", "float16", "--json")
    assert found.code == 0
    assert {"gemm", "depthwise", "dcnv3"} <= {row["rule"] for row in found.data}
    for row in found.data:
        (taken,) = (verdict for verdict in row["verdicts"] if verdict["taken"])
        assert taken["rule"] == row["rule"]
        assert all(verdict["reason"] for verdict in row["verdicts"])
        assert row["launch"].endswith("threads")


def test_report_needs_a_gpu_target(cli):
    found = cli(*MODEL, "cpu-znver4", "--report")
    assert found.code == 2
    assert "--report needs a GPU target" in found.err
