"""`simpo inspect` from a checkout: python tools/inspect_data.py --help."""

import sys

from simpo_megatron.commands.inspect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "tools/inspect_data.py"))
