"""What the head's gradient takes besides the framework's own gradient buffer: for a planner to count."""

from __future__ import annotations


def head_gradient_bytes(
    vocab_rows: int,
    hidden_size: int,
    *,
    weight_bytes: int,
    uses_main_grad: bool,
    scale_known: bool = True,
    dummy: bool = False,
) -> int:
    """Bytes of [V, H] tensors that `fused_linear_loss` needs for dHead at its peak, for one micro batch.

    The fp32 sum kept from forward to backward, if any, and what backward hands to autograd beside it.

    Args:
        vocab_rows: V, this rank's rows, padded ones included.
        hidden_size: H.
        weight_bytes: bytes of one entry of the head: 2 in bf16, 4 in fp32.
        uses_main_grad: the gradient is added to a buffer that exists anyway (`HeadGradient`).
        scale_known: with it, the factor of the loss sum is known in forward, so no sum is kept.
        dummy: with it, the framework's hook wants a tensor in the gradient's place.
    """
    kept = 0 if uses_main_grad and scale_known else 4
    handed_over = weight_bytes if dummy or not uses_main_grad else 0
    return vocab_rows * hidden_size * (kept + handed_over)
