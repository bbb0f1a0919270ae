"""Kernels as TIR, one family or stage per file."""
