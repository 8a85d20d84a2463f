import importlib.util

import pytest

from dcnv3_tvm.pytorch import extensions


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extensions, "environment_folder", lambda: tmp_path)
    return tmp_path


def test_install_status_and_remove(cli, environment):
    absent = {"state": "absent", "location": None, "version": None}
    installed = {"state": "stand-in", "location": str(environment), "version": "1.1"}
    has_pkg_resources = importlib.util.find_spec("pkg_resources") is not None
    for action, expected in (
        ("status", absent),
        ("install", installed),
        ("status", installed),
        ("remove", absent),
    ):
        done = cli("extensions", action, "--json")
        assert done.code == 0, done.err
        assert done.data == {**expected, "pkg_resources": has_pkg_resources}
    done = cli("extensions", "status")
    assert "`import DCNv3` finds nothing" in done.out
    assert ('pip install "setuptools<82"' in done.out) is not has_pkg_resources


def test_an_extension_is_not_replaced(cli, environment):
    (environment / "DCNv3.py").touch()
    done = cli("extensions", "install")
    assert (done.code, done.out) == (1, "")
    assert "is not replaced" in done.err
    assert "an extension that is not part of dcnv3-tvm" in cli("extensions", "remove").out
