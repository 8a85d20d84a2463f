"""Import PyTorch models into Relax."""
