"""Tiles of rows, as the kernels read and write them."""

import triton
import triton.language as tl

# Under TRITON_INTERPRET=1 the kernels run on CPU tensors, where bf16 arithmetic is wrong: tiles are widened.
INTERPRET = bool(triton.knobs.runtime.interpret)


@triton.constexpr_function
def tile_width(width: int) -> int:
    """Tiles are powers of two, and a dot needs 16 columns."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def load_rows(
    p_x,
    start,
    rows,
    stride_row,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Rows start … start + BLOCK_ROWS of a [rows, WIDTH] matrix with unit column stride, zero beyond its edges."""
    BLOCK_WIDTH: tl.constexpr = tile_width(WIDTH)
    o_row = tl.arange(0, BLOCK_ROWS)
    o_col = tl.arange(0, BLOCK_WIDTH)
    p_tile = p_x + tl.cast(start, tl.int64) * stride_row + o_row[:, None] * stride_row + o_col[None, :]
    m_row = (start + o_row < rows)[:, None]
    m_col = (o_col < WIDTH)[None, :]
    if CHECK_ROWS and BLOCK_WIDTH > WIDTH:
        b_x = tl.load(p_tile, mask=m_row & m_col, other=0.0)
    elif CHECK_ROWS:
        b_x = tl.load(p_tile, mask=m_row, other=0.0)
    elif BLOCK_WIDTH > WIDTH:
        b_x = tl.load(p_tile, mask=m_col, other=0.0)
    else:
        b_x = tl.load(p_tile)
    if INTERPRET:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def store_rows(p_x, start, rows, stride_row, b_x, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of load_rows, in the element type of x."""
    o_row = tl.arange(0, BLOCK_ROWS)
    o_col = tl.arange(0, tile_width(WIDTH))
    p_tile = p_x + tl.cast(start, tl.int64) * stride_row + o_row[:, None] * stride_row + o_col[None, :]
    m_tile = (start + o_row < rows)[:, None] & (o_col < WIDTH)[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_tile)
