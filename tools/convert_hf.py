"""`simpo convert` from a checkout: python tools/convert_hf.py --help."""

import sys

from simpo_megatron.commands.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "tools/convert_hf.py"))
