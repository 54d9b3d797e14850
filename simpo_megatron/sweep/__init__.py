"""Many runs on one set of ranks, one for each setting, and which of them is better."""
