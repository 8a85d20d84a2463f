"""Schedule rules for CUDA targets."""
