"""Arithmetic of launches in plain Python: triton.cdiv and triton.next_power_of_2 take 2 us a call,
for they ask of each number whether it is a kernel's constant (Triton 3.6 and 3.7, 2026-11-27)."""


def cdiv(n: int, size: int) -> int:
    """How many parts of `size` hold n."""
    return -(-n // size)


def padded(n: int) -> int:
    """To a power of two, as a block of a kernel is."""
    return 1 << (n - 1).bit_length()
