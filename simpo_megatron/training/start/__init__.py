"""The start of a run, up to its first step: where model and pairs are, the plan, the environment, and the pieces.

Each module is imported by itself: inputs, plan and environment are looked at before torch is loaded.
"""
