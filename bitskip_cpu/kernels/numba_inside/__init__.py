"""All that touches the insides of Numba."""
