"""Elementwise arithmetic, 16 floats at a time."""
