"""SimPO (arXiv 2405.14734) for Megatron-Core: the loss, the data and the trainer."""

__version__ = "0.1.0"
