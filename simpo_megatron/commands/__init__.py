"""The commands of `simpo`, a module each with `main(argv, prog)`; tools/ and examples/ call the same functions."""
