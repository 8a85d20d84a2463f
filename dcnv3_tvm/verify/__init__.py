"""Compare compiled models with PyTorch: tolerances, references, random weights."""
