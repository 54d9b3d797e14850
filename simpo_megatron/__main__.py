"""`python -m simpo_megatron` is `simpo`."""

from simpo_megatron.cli import run

if __name__ == "__main__":
    run()
