"""Host and device told apart on the CPU: what `.cpu()` made is on the host, everything else on the device."""

from __future__ import annotations

import torch

from asft_nemo.cpu.two_sides import two_sided


def sides(parameter: torch.Tensor) -> list[bool]:
    host = parameter.detach().clone().cpu()
    return [value.is_cuda for value in (parameter, parameter.float(), host, host.clone().float())]


def test_what_cpu_made_is_on_the_host() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    assert two_sided(sides)(parameter) == [True, True, False, False]
    assert not parameter.is_cuda


def test_a_copy_that_would_be_the_tensor_itself_leaves_it_on_the_device() -> None:
    def run(tensor: torch.Tensor) -> tuple[bool, bool]:
        return tensor.cpu().is_cuda, tensor.is_cuda

    assert two_sided(run)(torch.ones(2)) == (False, True)
