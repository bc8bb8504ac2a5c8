"""The kernels. Imported only where triton is wanted, for they need it at import."""

# Triton compiles these functions from their source; to a type checker their values are unknown.
# pyright: basic

import triton
import triton.language as tl


@triton.jit
def row_statistics_kernel(
    logits_ptr,
    ref_logits_ptr,
    own_ptr,
    label_ptr,
    packed_ptr,
    columns,
    row_stride,
    ref_row_stride,
    packed_stride,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: max, sum of exponentials, label logit, and with a divergence the reference's and cross.

    Blocks of columns are visited in order, the sums rescaled whenever the maximum grows.
    """
    # A chunk may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + row * row_stride
    y_ptr = ref_logits_ptr + row * ref_row_stride
    z_max = tl.full((), -float("inf"), tl.float32)
    y_max = tl.full((), -float("inf"), tl.float32)
    z_sum = tl.full((), 0.0, tl.float32)
    y_sum = tl.full((), 0.0, tl.float32)
    cross = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(z_ptr + column, mask=inside, other=-float("inf"))
        z_higher = tl.maximum(z_max, tl.max(z, axis=0))
        # Nothing but -inf so far: any finite shift gives exponentials of 0, where -inf would give NaN.
        z_shift = tl.where(z_higher == -float("inf"), 0.0, z_higher)
        z_exp = tl.exp(z - z_shift)
        z_scale = tl.exp(z_max - z_shift)
        z_sum = z_sum * z_scale + tl.sum(z_exp, axis=0)
        z_max = z_higher
        if DIVERGENCE != "none":
            y = tl.load(y_ptr + column, mask=inside, other=-float("inf"))
            y_higher = tl.maximum(y_max, tl.max(y, axis=0))
            y_shift = tl.where(y_higher == -float("inf"), 0.0, y_higher)
            y_exp = tl.exp(y - y_shift)
            y_scale = tl.exp(y_max - y_shift)
            y_sum = y_sum * y_scale + tl.sum(y_exp, axis=0)
            y_max = y_higher
            if DIVERGENCE == "forward":
                term = y_exp * (y - z)
                scale = y_scale
            else:
                term = z_exp * (z - y)
                scale = z_scale
            # Beyond the last column both logits are -inf, and their difference is NaN.
            cross = cross * scale + tl.sum(tl.where(inside, term, 0.0), axis=0)
    own = tl.load(own_ptr + row) != 0
    label = tl.load(label_ptr + row)
    out_ptr = packed_ptr + row * packed_stride
    tl.store(out_ptr, z_max)
    tl.store(out_ptr + 1, z_sum)
    tl.store(out_ptr + 2, tl.load(z_ptr + label, mask=own, other=0.0))
    if DIVERGENCE != "none":
        tl.store(out_ptr + 3, y_max)
        tl.store(out_ptr + 4, y_sum)
        tl.store(out_ptr + 5, cross)


@triton.jit
def row_gradient_kernel(
    logits_ptr,
    ref_logits_ptr,
    out_ptr,
    weight_ptr,
    upstream_ptr,
    own_ptr,
    label_ptr,
    lse_ptr,
    ref_lse_ptr,
    kl_ptr,
    ce_share,
    kl_weight,
    columns,
    row_stride,
    ref_row_stride,
    out_row_stride,
    upstream_stride,
    DIVERGENCE: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and block of columns; see `asft_nemo.losses.logit_grad` for the formula.

    `out_ptr` may be `logits_ptr`: a program writes the columns that it alone has read.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    ce_weight = tl.load(weight_ptr + row) + ce_share
    anchor_weight = kl_weight
    if HAS_UPSTREAM:
        upstream = tl.load(upstream_ptr + row * upstream_stride)
        ce_weight = ce_weight * upstream
        anchor_weight = anchor_weight * upstream
    lse = tl.load(lse_ptr + row)
    z = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=0.0)
    p = tl.exp(z - lse)
    if DIVERGENCE == "none":
        gradient = p * ce_weight
    else:
        ref_lse = tl.load(ref_lse_ptr + row)
        y = tl.load(ref_logits_ptr + row * ref_row_stride + column, mask=inside, other=0.0)
        if DIVERGENCE == "forward":
            gradient = p * ce_weight + (p - tl.exp(y - ref_lse)) * anchor_weight
        else:
            offset = tl.load(kl_ptr + row) + (lse - ref_lse)
            # log p - log q - KL = -(y - z) - offset
            gradient = p * (ce_weight - ((y - z) + offset) * anchor_weight)
    own = tl.load(own_ptr + row) != 0
    at_label = (column == tl.load(label_ptr + row)) & own
    gradient = tl.where(at_label, gradient - ce_weight, gradient)
    tl.store(out_ptr + row * out_row_stride + column, gradient.to(out_ptr.dtype.element_ty), mask=inside)
