import os

import pytest

from dcnv3_tvm.tvm_workarounds.device_code import keep_cuda_source


@pytest.mark.parametrize("value", [None, "0"])
def test_keep_cuda_source_restores_the_environment(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("TVM_COMPILE_FORCE_FALLBACK", raising=False)
    else:
        monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", value)
    with keep_cuda_source():
        assert os.environ["TVM_COMPILE_FORCE_FALLBACK"] == "1"
    assert os.environ.get("TVM_COMPILE_FORCE_FALLBACK") == value
