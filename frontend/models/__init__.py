"""InternImage in PyTorch: configuration, variants, modules and factory."""
