"""Fused kernels in Triton, for CUDA. Each has a slow twin in plain torch, to which it is tested equal."""
