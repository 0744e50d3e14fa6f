"""Ternary weights in two bits (FORMAT 1 and 2)."""

from __future__ import annotations

import numpy as np

GROUP = 256  # weights in 64 bytes


class IllegalCodeError(ValueError):
    """A packed byte holds code 3, which stands for no weight."""


def packed_width(in_features: int) -> int:
    """Bytes in a packed row of that many weights: a multiple of 64."""
    return -(-in_features // GROUP) * (GROUP // 4)


def pack_ternary(codes: np.ndarray) -> np.ndarray:
    """int [out, in] in -1..1 -> uint8 [out, packed_width(in)]; ValueError for other codes."""
    if codes.size and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(f"ternary codes must lie in -1..1, got {codes.min()}..{codes.max()}")
    rows, width = codes.shape
    padded = np.zeros((rows, packed_width(width) * 4), np.int8)
    padded[:, :width] = codes
    planes = (padded + 1).astype(np.uint8).reshape(rows, -1, 4, GROUP // 4)
    packed = planes[:, :, 0] | planes[:, :, 1] << 2 | planes[:, :, 2] << 4 | planes[:, :, 3] << 6
    return packed.reshape(rows, -1)


def unpack_ternary(packed: np.ndarray, in_features: int) -> np.ndarray:
    """Inverse of `pack_ternary`: uint8 [out, bytes] -> int8 [out, in_features] in -1..1."""
    check_codes(packed)
    rows = packed.shape[0]
    groups = packed.reshape(rows, -1, 1, GROUP // 4)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes = ((groups >> shifts) & 3).reshape(rows, -1).astype(np.int8) - np.int8(1)
    return codes[:, :in_features]


def check_codes(packed: np.ndarray) -> None:
    """Raise IllegalCodeError, naming the first place, if any pair of bits is 11."""
    flat = np.asarray(packed).reshape(-1)
    words = flat.view(np.uint64 if flat.size % 8 == 0 else np.uint8)
    scratch = np.empty(min(words.size, 1 << 15), words.dtype)  # little, for a mapped file
    for start in range(0, words.size, 1 << 15):
        part = words[start : start + (1 << 15)]
        both = np.right_shift(part, 1, out=scratch[: part.size])  # each bit and the one above it
        both &= part
        if int(np.bitwise_or.reduce(both)) & 0x5555555555555555:
            at = start * words.itemsize + int(np.flatnonzero(both.view(np.uint8) & 0x55)[0])
            raise IllegalCodeError(f"illegal 2-bit code 3 in byte {at} of a packed tensor")
