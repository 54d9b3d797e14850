"""`simpo merge` from a checkout: python tools/merge_checkpoints.py --help."""

import sys

from simpo_megatron.commands.merge import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "tools/merge_checkpoints.py"))
