"""Attention over cached keys and values (SPEC 6)."""
