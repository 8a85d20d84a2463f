"""InternImage in PyTorch: configuration, variants and modules."""
