"""Shipped tuning records match the current kernels."""

import collections

import pytest

from dcnv3_tvm import frontend, schedules
from dcnv3_tvm.schedules import records
from dcnv3_tvm.schedules.records import Records
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.tuning.tasks import model_tasks
from dcnv3_tvm.verify.placeholder_weights import placeholder_model

FOLDERS = sorted(path.name for path in records.SHIPPED.iterdir())


def test_cpus_have_records():
    assert {"cpu-znver4", "cpu-x86-64-v3", "cpu-x86-64-v4"} <= set(FOLDERS)


@pytest.mark.parametrize("slug", FOLDERS)
def test_provenance_of_records(slug):
    shipped = Records.read(records.SHIPPED / slug)
    about = shipped.about
    assert about.target == slug
    assert about.hardware
    assert about.cores >= 1
    assert about.commit
    assert about.trials >= len(shipped.by_workload) > 10
    for record in shipped.by_workload.values():
        assert record.speedup >= 1.03
        assert record.trials >= 1


@pytest.fixture(scope="module")
def imported():
    model = placeholder_model("internimage_t", shorten=True)
    return frontend.import_model(model, example=(1, 3, 224, 224))


@pytest.mark.slow
@pytest.mark.parametrize("slug", [slug for slug in FOLDERS if slug.startswith("cpu-")])
def test_records_hit_for_internimage_t(slug, imported):
    """After a change of kernels, tune again: see docs/contributing/tuning-records.md."""
    target = resolve_target(slug)
    found = records.find_records(target, "default")
    tasks = model_tasks(imported, target)
    assert len(tasks) == 40
    outcomes = collections.Counter(
        schedules.schedule_by_record(task.function, target, found).record for task in tasks
    )
    assert outcomes.keys() == {schedules.HIT, schedules.MISS}
    assert outcomes[schedules.HIT] >= 3


def test_other_cpus_use_records_of_their_vector_width():
    expected = {
        "skylake-avx512": "cpu-x86-64-v4",
        "emeraldrapids": "cpu-x86-64-v4",
        "haswell": "cpu-x86-64-v3",
    }
    for name, slug in expected.items():
        found = records.find_records(resolve_target(f"cpu-{name}"), "default")
        assert found is not None
        assert found.about.target == slug
