"""The ranks of a run among each other: they meet, tell what failed, watch for one that does not arrive, and compare.

Each module is imported by itself: a rank may have something to tell before torch is loaded.
"""
