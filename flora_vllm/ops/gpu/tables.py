"""What all Triton kernels share of reading a layer's tables (layouts: `kernels`)."""

# ruff: noqa: ANN001, ANN201 - Triton types a kernel's arguments itself: pointers, integers, constants.
import triton
import triton.language as tl

# Entries of the slot table for a slot and slice, and where they are.
WIDTH, A, B, RANK, PLAIN, PLAIN_STEP, OFFSET, DOWN, UP, LOW_RANK = (tl.constexpr(i) for i in (9, *range(9)))
# Segments looked at together.
CHUNK = tl.constexpr(32)


@triton.jit
def columns(tiles, tile, BN: tl.constexpr, ALIGNED: tl.constexpr):
    """(slice, columns, which of them are in the slice, the slice's first and last column) of a column tile."""
    tile_ptr = tiles + tile * 4
    n0, first, last = tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    if ALIGNED:
        # Known to be multiples, the bounds leave loads and stores whole: one of 16 bytes for eight of two.
        n0, first, last = tl.multiple_of(n0, 16), tl.multiple_of(first, 16), tl.multiple_of(last, 16)
    column = n0 + tl.arange(0, BN)
    return tl.load(tile_ptr), column, column < last, first, last


@triton.jit
def pointer(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    found = address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def factor(address, index, length, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to row `index` of a factor of rows of `length` at an address."""
    found = pointer(address, ELEMENT, ALIGNED) + index.to(tl.int64) * length
    if ALIGNED:
        # Said again for the sum: that length is a multiple need not be known.
        found = tl.multiple_of(found, 16)
    return found
