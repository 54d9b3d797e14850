"""Pages, cards and logs of runs and data: what a run writes for people to read."""
