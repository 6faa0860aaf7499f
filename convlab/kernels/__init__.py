"""Triton kernels, and where they run: compiled on a CUDA GPU or in Triton's interpreter."""

from convlab.kernels.running import interpreter, interpreting, missing

__all__ = ["interpreter", "interpreting", "missing"]
