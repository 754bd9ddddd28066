"""Kernels on an NVIDIA card at DeepSeek-V3.2's sizes: one line each, against the roofline and what else does it.

    python -m benchmarks.gpu [words of the cases wanted ...]

Every other module here has ``cases()``. Invariant: a case that is not correct prints no time.
"""
