"""Arithmetic of the definition (SPEC 2 to 8): engines are compared with it, none imports it."""
