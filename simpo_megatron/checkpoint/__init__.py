"""Checkpoints: the format on disk, the state of a run in shards, its writer, and the lock on a run's folder."""
