"""Passes over a model in Relax, one a file."""
