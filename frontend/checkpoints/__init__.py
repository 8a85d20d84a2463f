"""Read checkpoints and load them into InternImage."""
