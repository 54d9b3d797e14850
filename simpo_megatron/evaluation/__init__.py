"""Chat benchmarks: answers under their own settings, in the files that their official scorers read."""
