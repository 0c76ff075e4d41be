"""Splits a tile by columns, and combines the columns that one thread holds, without moving data between threads."""

import triton
import triton.language as tl


@triton.jit
def _split_halves(t, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Two [ROWS, COLS / 2]: left and right. In a tensor-core layout this moves no data."""
    return tl.split(tl.permute(tl.reshape(t, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def _join_halves(left, right, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS]: the inverse of _split_halves."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, COLS))


@triton.jit
def _split_quarters(t, ROWS: tl.constexpr, COLS: tl.constexpr):
    left, right = _split_halves(t, ROWS, COLS)
    left0, left1 = _split_halves(left, ROWS, COLS // 2)
    right0, right1 = _split_halves(right, ROWS, COLS // 2)
    return left0, left1, right0, right1


@triton.jit
def _column_products(p, ROWS: tl.constexpr, COLS: tl.constexpr, PRODUCT_COLUMNS: tl.constexpr):
    """[ROWS, PRODUCT_COLUMNS]: Π(1 + p) - 1 over the columns that are merged into one."""
    # Without the else Triton would also compile what follows a true condition.
    if COLS == PRODUCT_COLUMNS:
        return p
    else:
        left, right = _split_halves(p, ROWS, COLS)
        return _column_products(left + right + left * right, ROWS, COLS // 2, PRODUCT_COLUMNS)


@triton.jit
def _lane_sums(t, ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, LANES]: sums over the columns that one thread holds, so that no data moves."""
    if COLS == LANES:
        return t
    elif COLS == 2 * LANES:
        left, right = tl.split(tl.reshape(t, (ROWS, LANES, 2)))
        return left + right
    else:
        left, right = _split_halves(t, ROWS, COLS)
        return _lane_sums(left + right, ROWS, COLS // 2, LANES)


@triton.jit
def _lane_minima(t, ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, LANES]: minima over the same columns as _lane_sums."""
    if COLS == LANES:
        return t
    elif COLS == 2 * LANES:
        left, right = tl.split(tl.reshape(t, (ROWS, LANES, 2)))
        return tl.minimum(left, right)
    else:
        left, right = _split_halves(t, ROWS, COLS)
        return _lane_minima(tl.minimum(left, right), ROWS, COLS // 2, LANES)
