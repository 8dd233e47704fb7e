"""Bucketing: sizes are rounded up to a few values, so that few programs are compiled."""

_LENGTH = 64
_TILES = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


def round_up(size: int, step: int) -> int:
    """Rounds up to a multiple of `step`."""
    return -(-size // step) * step


def length_bucket(tokens: int) -> int:
    """Rounds a length up to 64 times 1, 2, 3, 4, 6, 8, 12, 16, ...

    Above 64, less than half of the result is padding.
    """
    size = _LENGTH
    while size < tokens:
        if size * 3 // 2 >= tokens and size > _LENGTH:
            return size * 3 // 2
        size *= 2
    return size


def tile_bucket(tiles: int) -> int:
    """Rounds a number of tiles up to a value in `_TILES`, above 64 to a multiple of 16."""
    return next((size for size in _TILES if size >= tiles), round_up(tiles, 16))


def row_bucket(rows: int, most: int) -> int:
    """Rounds a number of rows up to a power of two, at most `most`."""
    return min(1 << (rows - 1).bit_length(), most)
