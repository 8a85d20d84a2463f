"""CUDA: lowering, nvcc, machine code, and what the assembler reports."""
