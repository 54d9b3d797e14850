"""Answers of a model to prompts, and preference pairs made from them; needs no Megatron."""
