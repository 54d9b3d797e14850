"""Attention over packs in which chosen and rejected share their prompt: on the CPU, on a GPU, and with latent vectors.

Rotary embeddings are here too. Each module is imported by itself: that of Transformer Engine needs its library.
"""
