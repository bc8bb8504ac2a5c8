"""Optional Triton kernels for the elementwise stage of the loss, behind the signatures of its PyTorch path.

The statistics read a chunk's logits once and leave them as they are; the logit gradient reads them once more
and writes itself over them, or into a narrower tensor. triton is imported only where `use_triton` says yes.
"""

from asft_nemo.losses.triton.dispatch import use_triton
from asft_nemo.losses.triton.launch import row_gradient, row_statistics

__all__ = ["row_gradient", "row_statistics", "use_triton"]
