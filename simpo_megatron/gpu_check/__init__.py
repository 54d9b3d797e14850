"""One short run on one GPU: each check of the GPU path by its name, with a verdict, a value and a budget."""
