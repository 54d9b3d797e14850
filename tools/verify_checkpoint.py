"""`simpo verify` from a checkout: python tools/verify_checkpoint.py --help."""

import sys

from simpo_megatron.commands.verify import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "tools/verify_checkpoint.py"))
