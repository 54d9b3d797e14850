"""Answers of a model to prompts, and preference pairs made of them; needs no Megatron."""
