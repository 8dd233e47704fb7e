"""Sizes are rounded up to few values, so that few programs compile."""

_LENGTH = 64
_TILES = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


def round_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def length_bucket(tokens: int) -> int:
    """64 times 1, 2, 3, 4, 6, 8, 12, 16, ...: less than half of it is padding."""
    size = _LENGTH
    while size < tokens:
        if size * 3 // 2 >= tokens and size > _LENGTH:
            return size * 3 // 2
        size *= 2
    return size


def tile_bucket(tiles: int) -> int:
    """Slots for tiles."""
    return next((size for size in _TILES if size >= tiles), round_up(tiles, 16))


def row_bucket(rows: int, most: int) -> int:
    """A power of two, but never more than `most`."""
    return min(1 << (rows - 1).bit_length(), most)
