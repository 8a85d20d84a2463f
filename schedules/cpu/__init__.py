"""Schedule rules for LLVM targets."""
