"""Read checkpoint files, and load their weights into a model."""
