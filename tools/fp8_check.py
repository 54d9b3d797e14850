"""`simpo fp8-check` from a checkout: python tools/fp8_check.py --help."""

import sys

from simpo_megatron.commands.fp8_check import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "tools/fp8_check.py"))
