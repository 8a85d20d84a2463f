import re
from pathlib import Path

from dcnv3_tvm.tvm_workarounds import DEFECTS

ROOT = Path(__file__).resolve().parents[2]


def test_comments_refer_to_every_entry_and_to_no_other():
    sources = (
        path.read_text()
        for folder in ("dcnv3_tvm", "schedules", "frontend")
        for path in (ROOT / folder).rglob("*.py")
    )
    names = {
        name
        for source in sources
        for name in re.findall(r"tvm_workarounds:(?:\s|#)+([a-z][a-z0-9-]+)", source)
    }
    assert names == set(DEFECTS)
