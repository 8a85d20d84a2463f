"""Import PyTorch models into Relax, through ``torch.export``."""
