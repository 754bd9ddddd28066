"""Generators of training examples: one file per domain, each a pure function of a `random.Random`.

No third-party data set is stored here. Invariant: the answer of every example can be recomputed from its prompt.
"""
