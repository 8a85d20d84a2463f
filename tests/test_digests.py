"""Digests of files and memory."""

import hashlib

import pytest

from dcnv3_tvm import digests


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 48, 50])
def test_digest(tmp_path, monkeypatch, size):
    monkeypatch.setattr(digests, "PART", 16)
    content = bytes(range(size))
    parts = [content[start : start + 16] for start in range(0, size, 16)]
    expected = sha256(b"".join(map(sha256, parts))) if len(parts) > 1 else sha256(content)
    (tmp_path / "file").write_bytes(content)
    assert digests.digest_of_file(tmp_path / "file") == expected.hex()
    assert digests.digest_of(memoryview(content)) == expected.hex()
