"""Checks of the GPU path in one short run on one GPU; each has a verdict, a value and a budget."""
