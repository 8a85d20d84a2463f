"""Helpers for tests, of this library and of those who build on it."""
