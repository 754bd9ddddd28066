"""The command line. One file a command; ``main.py`` dispatches.

Nothing here computes: commands turn flags and files into calls of ``LLM`` and turn its outputs into text. Invariant:
importing any file of this package imports no torch, so that ``argosy --help`` answers at once. This is the one package
whose functions may import inside their bodies (the engine, the oracle): the import is the slow part of a start.
"""
