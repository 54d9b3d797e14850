"""The trainer: from a configuration to a trained model, its numbers and its report."""
