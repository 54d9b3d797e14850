"""SimPO on megatron-core: the model, its layout, and the forward step."""
