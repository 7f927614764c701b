"""How a rank's part of a matrix made of blocks falls on whole blocks."""


def covering(part: slice, size: int) -> tuple[slice, int]:
    """(the blocks of `size` that cover `part`, how far into the first it begins)."""
    first = part.start // size
    return slice(first, -(-part.stop // size)), part.start - first * size
