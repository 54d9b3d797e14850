"""`simpo plan` from a checkout: python tools/plan.py --help."""

import sys

from simpo_megatron.commands.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "tools/plan.py"))
