"""All that touches the insides of Numba; nothing else may (tests/test_house.py)."""

plain = False
"""Whether kernels are made by Numba's public `njit` alone, as its insides are not as we know them.

Set, by `bitskip_cpu.compiling`, before the kernels are imported."""
