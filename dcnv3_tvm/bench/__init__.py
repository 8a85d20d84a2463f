"""Benchmarks of the operator and the encoder, beside what people run otherwise, on this machine."""
