"""`python -m simpo_megatron` is `simpo`."""

import sys

from simpo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
