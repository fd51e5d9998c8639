"""What `n:m` may be. Apart from the masks, because the commands that check it should not have to import torch."""

from castlm.core.errors import InputError


def check_pattern(n: int, m: int) -> None:
    """Raises `InputError` unless `n` and `m` are integers with 1 <= n < m."""
    if not (type(n) is int and type(m) is int and 1 <= n < m):
        raise InputError(f"pattern {n}:{m} is not n:m with 1 <= n < m (n weights kept of every m): try 2:4")


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`"2:4"` -> `(2, 4)`. Raises `InputError` for anything that is not `n:m` with 1 <= n < m."""
    n, colon, m = pattern.partition(":")
    if not (colon and n.isascii() and n.isdigit() and m.isascii() and m.isdigit()):
        raise InputError(f"pattern {pattern!r} is not of the form n:m (n weights kept of every m): try 2:4")
    check_pattern(int(n), int(m))
    return int(n), int(m)


def check_width(width: int, m: int) -> None:
    """Raises `InputError` unless `width`, the length of the group axis, divides by `m`."""
    if width % m:
        raise InputError(f"a width of {width} does not divide by m = {m}: leave the layer dense or choose another m")
