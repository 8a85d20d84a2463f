"""``python -m dcnv3_tvm``: the command line."""

import sys

from dcnv3_tvm.cli import main

if __name__ == "__main__":
    sys.exit(main())
