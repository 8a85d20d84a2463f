"""DCNv3 for people who stay in PyTorch."""
