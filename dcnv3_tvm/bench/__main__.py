"""``python -m dcnv3_tvm.bench``: the same as ``dcnv3-tvm bench``."""

import sys

from dcnv3_tvm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
