"""Which row of the table of peaks a device's name finds."""

from __future__ import annotations

import pytest

from asft_nemo.config.devices import PEAKS, peak_tflops


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, None),
        ("NVIDIA H100 80GB HBM3", 989.4, 1978.9),
        ("NVIDIA H100 PCIe", 756.0, 1513.0),
        ("NVIDIA H200", 989.4, 1978.9),
        ("NVIDIA GH200 480GB", 989.4, 1978.9),
        ("NVIDIA H20", 148.0, 296.0),
        ("NVIDIA GB200", 2500.0, 5000.0),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA GeForce RTX 4090", None, None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None, None),
    ],
)
def test_the_name_finds_its_own_row(name: str, bf16: float | None, fp8: float | None) -> None:
    assert peak_tflops(name, "bf16") == bf16
    assert peak_tflops(name, "fp8_blockwise") == peak_tflops(name, "fp8_current") == fp8
    assert peak_tflops(name, "fp32") is None


def test_no_row_hides_a_later_one() -> None:
    names = [name for name, _ in PEAKS]
    hidden = [later for place, later in enumerate(names) for first in names[:place] if first in later]
    assert hidden == []
