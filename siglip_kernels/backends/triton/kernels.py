"""The fused block kernel: tensor cores form a tile of the logits, then its sigmoid-BCE epilogue runs in registers.

Measured by cross-compiling (no GPU): an epilogue over the whole tile at once spills on every part (1188 spill
instructions on sm_90 at 128x128 with 4 warps). In quarters of the columns few values are alive, if a branch separates
the quarters. Without the branch the scheduler interleaves them: 156 registers on sm_90 at 128x128 with 8 warps. With it
there are 125, so that two programs share a multiprocessor. dz waits for its second quarter, so that it is stored in
halves: a store is waited for. No spill under Triton 3.6 and 3.7.
"""

import triton
import triton.language as tl

from siglip_kernels.backends.triton.lanes import (
    _column_products,
    _join_halves,
    _lane_minima,
    _lane_sums,
    _split_quarters,
)

LABELS_NONE = tl.constexpr(0)
LABELS_OFFSET = tl.constexpr(1)
LABELS_IDS = tl.constexpr(2)
LABELS_IGNORE = tl.constexpr(3)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["M", "N", "positive_offset"])
def _sigmoid_block_kernel(
    x,  # [M, D] descriptor or pointer
    y,  # [N, D] descriptor or pointer
    dz,  # [M, N] descriptor or pointer, out; None without WRITE_DZ
    partials_ptr,  # [3, programs] float32, out: loss, dz·u, dz
    scale_ptr,  # [] float32
    bias_ptr,  # [] float32
    dz_scale_ptr,  # [] float32 or None
    image_ids_ptr,  # [M] integer or None
    text_ids_ptr,  # [N] integer or None
    image_weights_ptr,  # [M] float32 or None
    text_weights_ptr,  # [N] float32 or None
    image_masses_ptr,  # [M] float32 or None; given only with LABELS_IDS and HAS_WEIGHTS
    text_masses_ptr,  # [N] float32 or None
    stats_ptr,  # [8, programs] float32, out, or None; the rows are those of stats.py
    image_losses_ptr,  # [tiles of N, M] float32, out, or None: each image's loss in a tile. Given only with LOSS_ONLY
    teacher_ptr,  # [M, N] float32 or None: a teacher's inner products. Given only with a balance
    teacher_scale_ptr,  # [] float32 or None
    teacher_bias_ptr,  # the same
    M,
    N,
    D,
    stride_xm,
    stride_yn,
    stride_dzm,
    stride_teacher,  # None without a teacher
    positive_offset,
    positive_weight,  # float32; None without a balance. Given only with HAS_WEIGHTS
    label_smoothing,  # the same
    teacher_weight,  # float32; None without a teacher
    LABELS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    LOSS_ONLY: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    LANES: tl.constexpr,
    DZ_STORES: tl.constexpr,
):
    # A row's running product Π(1 + e) is kept in this many columns. Each multiplies up to 64 factors up to 2.
    # Not min: in Triton 3.5 that is no constexpr.
    PRODUCT_COLUMNS: tl.constexpr = 2 * LANES if 2 * LANES < BLOCK_N // 4 else BLOCK_N // 4
    # Every pair has a sign, -1 if it is positive. Without, only tiles that contain positives look for them.
    HAS_SIGN: tl.constexpr = LABELS >= LABELS_IDS or positive_weight is not None
    # A term is f · softplus(a) + rest · softplus(-a), times the weights.
    HAS_REST: tl.constexpr = SOFT_TARGETS or positive_weight is not None
    pid = tl.program_id(0)
    pid_m, pid_n = _swizzle(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m = pid_m * BLOCK_M
    # Before the products, which hide the latency.
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr)
    if USE_TMA:
        acc = _inner_products_tma(x, y, D, start_m, pid_n * BLOCK_N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    else:
        rows_x = _wrapped_rows(x, start_m, stride_xm, M, BLOCK_M)
        rows_y = _wrapped_rows(y, pid_n * BLOCK_N, stride_yn, N, BLOCK_N)
        acc = _inner_products(rows_x, rows_y, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    sum_loss = tl.zeros((BLOCK_M, LANES), tl.float32)
    sum_dzu = tl.zeros((BLOCK_M, LANES), tl.float32)
    sum_dz = tl.zeros((BLOCK_M, LANES), tl.float32)
    product = tl.zeros((BLOCK_M, PRODUCT_COLUMNS), tl.float32)
    if HAS_WEIGHTS:
        image_weights = tl.load(image_weights_ptr + offs_m, mask=mask_m, other=0.0)
    if LABELS >= LABELS_IDS:
        image_ids = tl.load(image_ids_ptr + offs_m, mask=mask_m, other=0)
    if image_masses_ptr is not None:
        image_masses = tl.load(image_masses_ptr + offs_m, mask=mask_m, other=0.0)
    if stats_ptr is not None:
        positives, negatives = _init_stats(BLOCK_M, LANES), _init_stats(BLOCK_M, LANES)

    QUARTER: tl.constexpr = BLOCK_N // 4
    if WRITE_DZ:
        DZ_DTYPE: tl.constexpr = dz.dtype if USE_TMA else dz.dtype.element_ty
    quarters = _split_quarters(acc, BLOCK_M, BLOCK_N)
    for quarter in tl.static_range(4):
        u = quarters[quarter]
        start_n = pid_n * BLOCK_N + quarter * QUARTER
        if WRITE_DZ:
            rounded = tl.zeros((BLOCK_M, QUARTER), DZ_DTYPE)
        # Nothing to do beyond the last text. The branch also keeps the quarters apart in the machine code.
        if start_n < N:
            offs_n = start_n + tl.arange(0, QUARTER)
            mask_n = offs_n < N

            sign, f = 1.0, 1.0  # where nothing below sets them
            # a = -s·z: positives change sign.
            a = u * scale + bias
            first = start_m + positive_offset - start_n
            on_diagonal = (first > -BLOCK_M) & (first < QUARTER)
            if LABELS == LABELS_OFFSET:
                if HAS_SIGN:
                    sign = tl.where((offs_m + positive_offset)[:, None] == offs_n[None, :], -1.0, 1.0)
                    a = a * sign
                elif on_diagonal:
                    a = tl.where((offs_m + positive_offset)[:, None] == offs_n[None, :], -a, a)
            if LABELS == LABELS_IDS:
                text_ids = tl.load(text_ids_ptr + offs_n, mask=mask_n, other=0)
                # A factor, not a mask: on CDNA masks spill scalar registers.
                sign = tl.where(image_ids[:, None] == text_ids[None, :], -1.0, 1.0)
                a = a * sign
            if LABELS == LABELS_IGNORE:
                text_ids = tl.load(text_ids_ptr + offs_n, mask=mask_n, other=0)
                sign = tl.where((offs_m + positive_offset)[:, None] == offs_n[None, :], -1.0, 1.0)
                # Pairs that are left out get -inf, like those out of range.
                same = image_ids[:, None] == text_ids[None, :]
                a = tl.where(same & (sign > 0), float("-inf"), a * sign)
            if (start_m + BLOCK_M > M) | (start_n + QUARTER > N):
                # Out of range: softplus and sigmoid of -inf are 0.
                # With a rest softplus(-a) counts too: a must be finite, and the weight of 0 removes the term.
                a = tl.where(mask_m[:, None] & mask_n[None, :], a, -1e4 if HAS_REST else float("-inf"))

            # Folding log2(e) into scale and bias would save this product, but their rounding is the same for every
            # pair: at z = -10 it shifts σ by 5e-7.
            e = tl.exp2(-tl.abs(a) * LOG2E)
            if HAS_WEIGHTS:
                text_weights = tl.load(text_weights_ptr + offs_n, mask=mask_n, other=0.0)
                softplus = tl.maximum(a, 0.0) + _log1p(e)
                if image_masses_ptr is not None:
                    text_masses = tl.load(text_masses_ptr + offs_n, mask=mask_n, other=0.0)
                    f = tl.where(sign < 0, image_masses[:, None] + text_masses[None, :], 1.0)
                if positive_weight is not None:
                    taught, untaught = None, None
                    if teacher_ptr is not None:
                        at = teacher_ptr + offs_m.to(tl.int64)[:, None] * stride_teacher + offs_n[None, :]
                        taught_z = tl.load(at, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
                        taught_z = taught_z * tl.load(teacher_scale_ptr) + tl.load(teacher_bias_ptr)
                        taught, untaught = _sigmoids(-taught_z * sign)
                        factor = teacher_weight if SOFT_TARGETS else teacher_weight * f
                        taught, untaught = factor * taught, factor * untaught
                    f, rest = _balanced(
                        f, sign < 0, positive_weight, label_smoothing, SOFT_TARGETS, taught, untaught, teacher_weight
                    )
                    if LABELS == LABELS_IGNORE:
                        rest = tl.where(same & (sign > 0), 0.0, rest)
                    # Where a is -inf and has no rest, 0 · inf would be NaN.
                    opposite = tl.where(rest != 0, tl.maximum(-a, 0.0), 0.0)
                    softplus = f * tl.maximum(a, 0.0) + rest * opposite + (f + rest) * _log1p(e)
                elif SOFT_TARGETS:
                    opposite = tl.maximum(tl.where(sign < 0, -a, 0.0), 0.0)
                    softplus = f * tl.maximum(a, 0.0) + (1.0 - f) * opposite + _log1p(e)
                    rest = 1.0 - f
                else:
                    softplus = softplus * f
                sum_loss += _lane_sums(softplus * text_weights[None, :], BLOCK_M, QUARTER, LANES)
            else:
                # Σ log1p(e) = log1p(p), where p accumulates Π(1 + e) - 1 without forming 1 + e.
                p = _column_products(e, BLOCK_M, QUARTER, PRODUCT_COLUMNS)
                product = product + p + product * p
                sum_loss += _lane_sums(tl.maximum(a, 0.0), BLOCK_M, QUARTER, LANES)

            if stats_ptr is not None:
                z = u * scale + bias
                valid = mask_m[:, None] & mask_n[None, :]
                if HAS_WEIGHTS:
                    valid = valid & (image_weights != 0)[:, None] & (text_weights != 0)[None, :]
                if LABELS == LABELS_IGNORE:
                    valid = valid & ((sign < 0) | (image_ids[:, None] != text_ids[None, :]))
                if HAS_SIGN:
                    positives = _update_stats(positives, z, valid & (sign < 0), BLOCK_M, QUARTER, LANES)
                    valid = valid & (sign > 0)
                elif LABELS == LABELS_OFFSET:
                    diagonal = (offs_m + positive_offset)[:, None] == offs_n[None, :]
                    positives = _update_stats(positives, z, valid & diagonal, BLOCK_M, QUARTER, LANES)
                    valid = valid & ~diagonal
                negatives = _update_stats(negatives, z, valid, BLOCK_M, QUARTER, LANES)

            if not LOSS_ONLY:
                # σ(|a|) = 1 / (1 + e) and σ(-|a|) = e / (1 + e). rsqrt squared is the shortest reciprocal.
                root = tl.rsqrt(1.0 + e)
                g = tl.where(a >= 0, 1.0, e) * (root * root)
                g = g * f
                if HAS_REST:
                    g = g - rest * (tl.where(a >= 0, e, 1.0) * (root * root))
                if HAS_WEIGHTS:
                    g = g * (image_weights[:, None] * text_weights[None, :])
                if HAS_SIGN:
                    g = g * sign
                elif LABELS == LABELS_OFFSET:
                    if on_diagonal:
                        g = tl.where((offs_m + positive_offset)[:, None] == offs_n[None, :], -g, g)
                sum_dzu += _lane_sums(g * u, BLOCK_M, QUARTER, LANES)
                sum_dz += _lane_sums(g, BLOCK_M, QUARTER, LANES)
                if WRITE_DZ:
                    if dz_scale_ptr is not None:
                        g = g * tl.load(dz_scale_ptr)
                    rounded = g.to(DZ_DTYPE)
                    if DZ_STORES == 4:
                        _store_dz(dz, rounded, start_m, start_n, M, N, stride_dzm, USE_TMA, BLOCK_M, QUARTER)

        if WRITE_DZ and DZ_STORES == 2:
            if quarter % 2 == 0:
                left = rounded
            elif start_n - QUARTER < N:
                both = _join_halves(left, rounded, BLOCK_M, 2 * QUARTER)
                _store_dz(dz, both, start_m, start_n - QUARTER, M, N, stride_dzm, USE_TMA, BLOCK_M, 2 * QUARTER)

    if HAS_WEIGHTS:
        sum_loss = sum_loss * image_weights[:, None]
    else:
        sum_loss += _lane_sums(_log1p(product), BLOCK_M, PRODUCT_COLUMNS, LANES)
    programs = tl.num_programs(0)
    if image_losses_ptr is not None:
        at = image_losses_ptr + pid_n.to(tl.int64) * M + offs_m
        tl.store(at, tl.sum(sum_loss, axis=1), mask=mask_m)
    tl.store(partials_ptr + pid, tl.sum(sum_loss))
    if not LOSS_ONLY:
        tl.store(partials_ptr + programs + pid, tl.sum(sum_dzu))
        tl.store(partials_ptr + 2 * programs + pid, tl.sum(sum_dz))
    if stats_ptr is not None:
        _store_stats(stats_ptr + pid, positives, programs)
        _store_stats(stats_ptr + programs + pid, negatives, programs)


@triton.jit
def _swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n): GROUP_M rows of tiles at a time, column by column, so that neighbours share operands in L2."""
    group = pid // (GROUP_M * tiles_n)
    inside = pid % (GROUP_M * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + inside % rows, inside // rows


@triton.jit
def _inner_products_tma(
    x,
    y,
    D,
    start_m,
    start_n,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] float32; zero out of range."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        acc = tl.dot(x.load([start_m, d]), y.load([start_n, d]).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _inner_products(
    rows_x, rows_y, D, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_M, BLOCK_N] float32 from pointers to rows; out of range it repeats rows that are in range."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    for d in range(0, D, BLOCK_D):
        mask_d = (offs_d < D - d)[None, :]
        x = tl.load(rows_x[:, None] + (d + offs_d)[None, :], mask=mask_d, other=0.0)
        y = tl.load(rows_y[:, None] + (d + offs_d)[None, :], mask=mask_d, other=0.0)
        acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _wrapped_rows(base_ptr, start, stride, length, BLOCK: tl.constexpr):
    """[BLOCK] pointers to rows. They wrap round at the end, so that no row needs a mask."""
    rows = (start + tl.arange(0, BLOCK)) % length
    return base_ptr + rows.to(tl.int64) * stride


@triton.jit
def _log1p(p):
    """log(1 + p) for p >= 0, corrected for the rounding of 1 + p."""
    w = 1.0 + p
    # The correction is at most 2^-24 of w: an approximate 1 / w is enough, and the epilogue already has this one.
    root = tl.rsqrt(w)
    return tl.log(w) + (p - (w - 1.0)) * (root * root)


@triton.jit
def _sigmoids(z):
    """(σ(z), σ(-z)), each to its own rounding."""
    e = tl.exp2(-tl.abs(z) * LOG2E)
    root = tl.rsqrt(1.0 + e)
    large, small = root * root, e * (root * root)
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def _balanced(
    mass,
    positive,
    positive_weight,
    label_smoothing,
    SOFT_TARGETS: tl.constexpr,
    taught,  # weight · σ of the teacher's logit, its sign that of the pair; None without a teacher
    untaught,  # the rest to the weight
    teacher_weight,
):
    """(f, rest) of pairs with a balance. No difference here cancels, however small label_smoothing is."""
    kept = 1.0 - label_smoothing
    f, rest = kept * mass, label_smoothing * mass
    if SOFT_TARGETS:
        f, rest = f + label_smoothing * (1.0 - mass), rest + kept * (1.0 - mass)
    if taught is None:
        f = tl.where(positive, positive_weight * f, kept)
        return f, tl.where(positive, rest, positive_weight * label_smoothing)
    else:  # negatives have the mass 1
        f, rest = (1.0 - teacher_weight) * f + taught, (1.0 - teacher_weight) * rest + untaught
        return tl.where(positive, positive_weight * f, f), tl.where(positive, rest, positive_weight * rest)


@triton.jit
def _init_stats(ROWS: tl.constexpr, LANES: tl.constexpr):
    """Σ z, number, least z and least -z of no pairs, [ROWS, LANES] each."""
    zeros = tl.zeros((ROWS, LANES), tl.float32)
    inf = tl.full((ROWS, LANES), float("inf"), tl.float32)
    return zeros, zeros, inf, inf


@triton.jit
def _update_stats(stats, z, chosen, ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr):
    """``stats``, first from _init_stats, after adding the ``chosen`` elements of z [ROWS, COLS]."""
    total, count, least, least_negated = stats
    inf = float("inf")
    total += _lane_sums(tl.where(chosen, z, 0.0), ROWS, COLS, LANES)
    count += _lane_sums(tl.where(chosen, 1.0, 0.0), ROWS, COLS, LANES)
    least = tl.minimum(least, _lane_minima(tl.where(chosen, z, inf), ROWS, COLS, LANES))
    least_negated = tl.minimum(least_negated, _lane_minima(tl.where(chosen, -z, inf), ROWS, COLS, LANES))
    return total, count, least, least_negated


@triton.jit
def _store_stats(at, stats, programs):
    """Store ``stats`` into every other row of [8, programs], starting at ``at``."""
    total, count, least, least_negated = stats
    tl.store(at, tl.sum(total))
    tl.store(at + 2 * programs, tl.sum(count))
    tl.store(at + 4 * programs, tl.min(tl.min(least, 1), 0))
    tl.store(at + 6 * programs, -tl.min(tl.min(least_negated, 1), 0))


@triton.jit
def _store_dz(
    dz,
    values,
    start_m,
    start_n,
    M,
    N,
    stride,
    USE_TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    if USE_TMA:
        # TMA writes the last 16 bytes of a row whole, beyond N into the padding.
        dz.store([start_m, start_n], values)
    else:
        offs_m, offs_n = start_m + tl.arange(0, ROWS), start_n + tl.arange(0, COLS)
        rows = dz + offs_m.to(tl.int64) * stride
        tl.store(rows[:, None] + offs_n[None, :], values, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
