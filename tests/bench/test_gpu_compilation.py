"""Cases of a GPU run and their compilation."""

import concurrent.futures
import dataclasses

import pytest

from dcnv3_tvm.bench.budget import OutOfTimeError
from dcnv3_tvm.bench.gpu_cases import (
    GradientKernel,
    backward_groups,
    compile_jobs,
    encoder_cases,
    operator_groups,
    select_cases,
    with_logits,
)
from dcnv3_tvm.bench.gpu_compilation import CompilePool, compile_job, compiled_path
from dcnv3_tvm.compiler.compile_kernel import GRAD_X
from dcnv3_tvm.spec import DCNv3Spec

SPEC = DCNv3Spec.of((2, 9, 7, 8), group=2)


def test_cases():
    groups = {found.slug: found.specs for found in operator_groups()}
    assert [spec.slug for spec in groups["paper-f16"]] == [
        "dcnv3-n64-h56-w56-c128-g8-k3-s1-p1-d1-f16",
        "dcnv3-n64-h28-w28-c256-g16-k3-s1-p1-d1-f16",
        "dcnv3-n64-h14-w14-c512-g32-k3-s1-p1-d1-f16",
        "dcnv3-n64-h7-w7-c1024-g64-k3-s1-p1-d1-f16",
        "dcnv3-n64-h14-w14-c768-g48-k3-s1-p1-d1-f16",
    ]
    assert [spec.input_shape for spec in groups["pyramid-f32"]] == [
        (1, 200, 320, 64),
        (1, 100, 160, 128),
        (1, 50, 80, 256),
        (1, 25, 40, 512),
    ]
    assert len(groups["stages-bf16"]) == 24
    assert groups["stages-f16"] == backward_groups()[0].specs
    assert all(spec.group_channels in (16, 32) for specs in groups.values() for spec in specs)
    encoders = [case.slug for case in encoder_cases()]
    assert len(encoders) == 10
    assert encoders[:2] == ["internimage_t-n64-h224-w224-f16", "internimage_t-n1-h224-w224-f16"]


def test_select_cases():
    groups, cases = select_cases(["op", "backward"], "*c128*-f16")
    assert cases == []
    slugs = [found.slug for found in groups]
    assert slugs == ["paper-f16", "pyramid-f16", "stages-f16", "backward-f16"]
    groups, cases = select_cases(["op", "encoder"], "internimage_l-*")
    assert groups == []
    assert [case.batch for case in cases] == [64, 1]


def test_jobs_are_in_the_order_of_measurement():
    groups, cases = select_cases(["op", "encoder"])
    jobs = compile_jobs(groups, cases)
    assert jobs[:5] == [with_logits(spec) for spec in groups[0].specs]
    assert jobs[10:20] == cases
    assert len(jobs) == len(set(jobs)) == 2 * sum(len(found.specs) for found in groups) + 10


def test_jobs_of_gradients():
    groups, _ = select_cases(["backward"], "*n64-h56-w56-c64-*-f32")
    assert [job.slug for job in compile_jobs(groups, [])] == [
        "dcnv3_grad_x-n64-h56-w56-c64-g4-k3-s1-p1-d1-f32",
        "dcnv3_grad_offset_mask-n64-h56-w56-c64-g4-k3-s1-p1-d1-f32",
    ]


def test_existing_results_are_reused(tmp_path):
    path = compiled_path(SPEC, tmp_path)
    path.write_bytes(b"compiled elsewhere")
    with CompilePool(tmp_path, "cuda-sm90", 1) as pool:
        pool.submit([SPEC])
        assert pool.result(SPEC) == path
    assert path.read_bytes() == b"compiled elsewhere"


def test_slow_compilation_times_out(tmp_path):
    with CompilePool(tmp_path, "cuda-sm90", 1) as pool:
        pool._futures[SPEC] = concurrent.futures.Future()
        with pytest.raises(OutOfTimeError, match="not compiled in time"):
            pool.result(SPEC, 0.01)


@pytest.mark.slow
def test_compilation_in_another_process(tmp_path):
    job = GradientKernel(GRAD_X, dataclasses.replace(SPEC, dtype="float16"))
    with CompilePool(tmp_path, "cuda-sm90", 1) as pool:
        pool.submit([job])
        path = pool.result(job)
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert compile_job(job, tmp_path, "cuda-sm90") == path
