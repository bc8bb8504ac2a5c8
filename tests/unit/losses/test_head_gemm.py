"""The head's matrix products: accumulated in the wide dtype, whatever the operands are."""

import pytest
import torch

from asft_nemo.losses import head_gemm

TOKENS, VOCAB, HIDDEN = 12, 70, 16


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: bf16 operands are multiplied into fp32 there without being widened")
    return request.param


@pytest.fixture(params=["one-block", "many-blocks"])
def _blocks(request, monkeypatch):
    if request.param == "many-blocks":
        monkeypatch.setattr(head_gemm, "_WIDENED_BYTES", 7 * HIDDEN * 4)


def operands(device, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    head = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    gradient = torch.randn(TOKENS, VOCAB, generator=generator)
    return hidden.to(device), head.to(device), gradient.to(device)


def error(ours, exact):
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_any_operands_are_fp32(device, dtype):
    hidden, head, gradient = operands(device, dtype)
    logits = torch.full((TOKENS, VOCAB), torch.nan, device=device)
    head_gemm.logits_into(logits, hidden, head)
    assert error(logits, hidden.double() @ head.double().T) <= 1e-6, "logits are not rounded to bf16"

    # On a GPU the logit gradient takes the operands' dtype, for the sake of the matrix units.
    tolerance = 2**-8 if dtype == torch.bfloat16 and device == "cuda" else 1e-6
    hidden_gradient = torch.full((TOKENS, HIDDEN), torch.nan, device=device)
    head_gemm.hidden_gradient_into(hidden_gradient, gradient, head)
    assert error(hidden_gradient, gradient.double() @ head.double()) <= tolerance

    head_gradient = torch.full((VOCAB, HIDDEN), 3.0, device=device)
    head_gemm.add_head_gradient(head_gradient, gradient, hidden)
    assert error(head_gradient - 3.0, gradient.double().T @ hidden.double()) <= tolerance


@pytest.mark.usefixtures("_blocks")
def test_a_head_gradient_buffer_may_be_narrow(device):
    hidden, _, gradient = operands(device, torch.bfloat16)
    buffer = torch.full((VOCAB, HIDDEN), 3.0, device=device, dtype=torch.bfloat16)
    head_gemm.add_head_gradient(buffer, gradient, hidden)
    exact = 3.0 + gradient.double().T @ hidden.double()
    assert error(buffer, exact) <= 2**-8
    assert buffer.dtype == torch.bfloat16


@pytest.fixture(params=["torch-2.9", "torch-2.10"])
def _as_on_cuda(request, monkeypatch):
    """CUDA's products of bf16 operands into fp32, computed here; with their checks (aten/src/ATen/native/cuda/Blas.cpp)."""

    def mm(left, right, *, out_dtype):
        assert left.dtype == right.dtype == torch.bfloat16
        return torch.matmul(left.to(out_dtype), right.to(out_dtype))

    def addmm(total, left, right, *, out_dtype, out):
        if request.param == "torch-2.9" and total.dtype != right.dtype:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        return out.copy_(total + mm(left, right, out_dtype=out_dtype))

    monkeypatch.setattr(head_gemm, "_mixed_gemm", lambda *operands: operands[0].dtype == torch.bfloat16)
    monkeypatch.setattr(head_gemm, "_SUMMED_BYTES", 7 * HIDDEN * 4)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    head_gemm._adds_mixed.cache_clear()
    yield
    head_gemm._adds_mixed.cache_clear()


@pytest.mark.usefixtures("_as_on_cuda")
def test_a_torch_that_adds_no_product_to_a_wider_sum_gives_the_same_sum():
    hidden, _, gradient = operands("cpu", torch.bfloat16)
    gradient = gradient.to(torch.bfloat16)
    total = torch.full((VOCAB, HIDDEN), 3.0)
    head_gemm.add_head_gradient(total, gradient, hidden)
    assert error(total - 3.0, gradient.double().T @ hidden.double()) <= 1e-6
