"""InternImage in PyTorch: modules, variants, registry."""
