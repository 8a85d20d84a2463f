"""Tuning records: writing, reading, validation and use by the compiler."""

import dataclasses
import json

import numpy as np
import pytest

import dcnv3_tvm as dt
from dcnv3_tvm import schedules
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules import records
from dcnv3_tvm.schedules.records import About, Record, Records, RecordsError
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target, target_slug

ABOUT = About(
    target=target_slug(resolve_target()),
    tvm=records.tvm_version(),
    hardware="a machine",
    cores=2,
    commit=None,
    trials=10,
    date="2026-01-01T00:00:00+00:00",
)
SPEC = DCNv3Spec.of((1, 8, 8, 32), group=2)
MATMUL = matmul((3, 13), 24, 64, tile=32)


def record(func, decisions, seconds=1e-4):
    return Record(
        workload=records.workload_key(func),
        kernel=records.describe_kernel(func),
        rule="any",
        decisions=decisions,
        seconds=seconds,
        default_seconds=2e-4,
        trials=7,
    )


def test_round_trip(tmp_path):
    kept = Records.of(ABOUT, [record(MATMUL, {"rows": 3}), record(tensorir.dcnv3(SPEC), {})])
    kept.write(tmp_path / "records")
    assert Records.read(tmp_path / "records") == kept


def test_keeps_fastest_record_of_kernel():
    slow, fast = record(MATMUL, {"rows": 1}, 2e-4), record(MATMUL, {"rows": 3}, 1e-4)
    for order in ([slow, fast], [fast, slow]):
        assert list(Records.of(ABOUT, order).by_workload.values()) == [fast]


def test_workload_key_ignores_names():
    key = records.workload_key(MATMUL)
    assert records.workload_key(MATMUL.with_attr("global_symbol", "other")) == key
    assert records.workload_key(MATMUL.with_attr("op_pattern", 3)) == key
    assert records.workload_key(matmul((3, 13), 24, 64, tile=16)) != key
    assert records.workload_key(matmul((3, 14), 24, 64, tile=32)) != key


def test_describe_kernel():
    assert records.describe_kernel(MATMUL) == "matmul(3x13x24, 2x24x32) -> 3x13x64"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tvm": "0.0.1"}, "another version of TVM; got apache-tvm 0.0.1"),
        ({"schema": 0}, "another format; got schema 0"),
        ({"trials": "many"}, "no tuning records can be read"),
        ({"schema": []}, "another format"),
    ],
)
def test_rejects_other_format_or_tvm_version(tmp_path, change, message):
    Records.of(ABOUT, [record(MATMUL, {})]).write(tmp_path / "r")
    path = tmp_path / "r" / "about.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecordsError, match=message):
        Records.read(tmp_path / "r")


def test_error_shows_damaged_record(tmp_path):
    Records.of(ABOUT, [record(MATMUL, {})]).write(tmp_path / "r")
    with (tmp_path / "r" / "records.jsonl").open("a") as stream:
        stream.write('{"workload": "12\n')
    with pytest.raises(
        RecordsError, match=r"a tuning record is damaged; got '\{\"workload\": \"12'"
    ):
        Records.read(tmp_path / "r")
    valid = dataclasses.asdict(record(MATMUL, {}))
    lines = [
        json.dumps(valid | change)
        for change in ({"seconds": "1"}, {"seconds": 0.0}, {"workload": []}, {"decisions": [1]})
    ]
    for line in ("[]", "1", "[" * 200_000, *lines):
        (tmp_path / "r" / "records.jsonl").write_text(line)
        with pytest.raises(RecordsError, match="a tuning record is damaged"):
            Records.read(tmp_path / "r")
    (tmp_path / "r" / "records.jsonl").write_bytes(b"\xff")
    with pytest.raises(RecordsError, match="no tuning records can be read"):
        Records.read(tmp_path / "r")
    (tmp_path / "r" / "about.json").write_text("[]")
    with pytest.raises(RecordsError, match="no tuning records can be read"):
        Records.read(tmp_path / "r")


def test_write_replaces_only_records(tmp_path):
    kept = Records.of(ABOUT, [record(MATMUL, {})])
    kept.write(tmp_path)
    kept.write(tmp_path)
    (tmp_path / "session").mkdir()
    kept.write(tmp_path / "session" / "records")
    (tmp_path / "file").touch()
    for taken in ("session", "file"):
        with pytest.raises(RecordsError, match="does not hold tuning records"):
            kept.write(tmp_path / taken)
    assert (tmp_path / "session" / "records").is_dir()
    assert (tmp_path / "file").is_file()


def test_folder_without_records(tmp_path):
    with pytest.raises(RecordsError, match="no tuning records can be read"):
        Records.read(tmp_path)
    assert not records.holds_records(tmp_path)


def test_find_records(tmp_path):
    target = resolve_target()
    kept = Records.of(ABOUT, [record(MATMUL, {})])
    kept.write(tmp_path / "session" / "records")
    kept.write(tmp_path / "plain")
    for folder in ("session", "plain"):
        assert records.find_records(target, tmp_path / folder) == kept
    assert records.find_records(target, "none") is None
    with pytest.raises(RecordsError, match="for another target"):
        records.find_records(resolve_target("cuda-sm90"), tmp_path / "plain")


def test_other_cpus_use_records_of_their_vector_width(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHIPPED", tmp_path)
    records._shipped.cache_clear()
    generic = dataclasses.replace(ABOUT, target="cpu-x86-64-v4")
    Records.of(generic, [record(MATMUL, {})]).write(tmp_path / generic.target)
    try:
        found = records.find_records(resolve_target("cpu-icelake-server"), "default")
        assert found is not None
        assert found.about.target == "cpu-x86-64-v4"
        assert records.find_records(resolve_target("cpu-haswell"), "default") is None
        assert records.find_records(resolve_target("cuda-sm90"), "default") is None
    finally:
        records._shipped.cache_clear()


def test_schedule_by_record():
    target = resolve_target()
    found = schedules.schedule_by_record(
        MATMUL, target, Records.of(ABOUT, [record(MATMUL, {"rows": 3})])
    )
    assert found.record == schedules.HIT
    assert (
        found.function.script() == schedules.schedule(MATMUL, target, {"rows": 3}).function.script()
    )
    assert found.function.script() != schedules.schedule(MATMUL, target).function.script()


@pytest.mark.parametrize(
    ("decisions", "reason"),
    [
        ({"rows": 5}, "does not support this value of rows; got 5"),
        ({"colour": 1}, "no such decision; got colour"),
    ],
)
def test_unusable_record_reports_reason_and_keeps_defaults(decisions, reason):
    target = resolve_target()
    kept = Records.of(ABOUT, [record(MATMUL, decisions)])
    found = schedules.schedule_by_record(MATMUL, target, kept)
    assert reason in found.record
    assert found.function.script() == schedules.schedule(MATMUL, target).function.script()


def test_kernel_without_record():
    found = schedules.schedule_by_record(MATMUL, resolve_target(), Records.of(ABOUT, []))
    assert found.record == schedules.MISS


def test_compile_op_uses_records(tmp_path, rng):
    kernel = tensorir.dcnv3(SPEC)
    Records.of(ABOUT, [record(kernel, {"task": "pixel"})]).write(tmp_path / "r")
    tuned = dt.compile_op(SPEC, database=tmp_path / "r")
    plain = dt.compile_op(SPEC, database="none")
    assert (tuned.kernel.record, plain.kernel.record) == ("hit", "")
    x = rng.standard_normal(SPEC.input_shape, np.float32)
    offset = rng.standard_normal(SPEC.offset_shape, np.float32)
    mask = rng.standard_normal(SPEC.mask_shape, np.float32)
    np.testing.assert_allclose(tuned(x, offset, mask), plain(x, offset, mask), rtol=0, atol=1e-5)
