"""Benchmarks of the operator and the encoder against other runtimes, on the user's machine."""
