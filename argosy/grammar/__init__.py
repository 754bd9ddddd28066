"""Grammars that outputs must match: written for llguidance, compiled, and followed token by token."""
