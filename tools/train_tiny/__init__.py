"""Trains `argosy-tiny`, the checkpoint built into Argosy: data, tokenizer, model, recipe, export and evaluation.

Nothing in the engine imports this package, and it imports nothing of the engine.
Invariant: one command with one seed reproduces the checkpoint's recipe from generators alone.
"""
