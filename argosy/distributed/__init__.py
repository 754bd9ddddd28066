"""Parallelism. Today: one rank, so only the null twins stand here."""
