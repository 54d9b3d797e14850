"""SimPO on real megatron-core: the model, its layout, the step's forward function."""
