"""Relax passes, one a file, and the lowering of layers to kernels."""
