"""What devices can do at most, to compare a run's speed with."""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """Dense tensor-core products with fp32 sums, in 10^12 operations a second; None where the device has none of that format."""

    bf16: float
    fp8: float | None


# Part of the name that torch.cuda.get_device_name tells -> peak; the first match counts, so longer names stand before their parts.
# NVIDIA's data sheets (A100 2021; H100, H200, GH200 2023-24; L40S 2023; Blackwell 2024), which state most of them with sparsity: twice this.
PEAKS: tuple[tuple[str, Peak], ...] = (
    ("GB200", Peak(2500.0, 5000.0)),
    ("B200", Peak(2250.0, 4500.0)),
    ("GH200", Peak(989.4, 1978.9)),
    ("H200 NVL", Peak(835.5, 1671.0)),
    ("H200", Peak(989.4, 1978.9)),
    ("H100 PCIe", Peak(756.0, 1513.0)),
    ("H100 NVL", Peak(835.5, 1671.0)),
    ("H100", Peak(989.4, 1978.9)),
    ("H800", Peak(989.4, 1978.9)),
    ("H20", Peak(148.0, 296.0)),
    ("A100", Peak(312.0, None)),
    ("A800", Peak(312.0, None)),
    ("L40S", Peak(362.0, 733.0)),
)


def peak_tflops(device_name: str, precision: str) -> float | None:
    """The most that a device does in a run's precision, in 10^12 operations a second.

    Args:
        device_name: as torch tells it, for example ``NVIDIA H100 80GB HBM3``.
        precision: a value of the setting `precision`.

    Returns:
        None where the table does not know: another device, a part of one (MIG), or fp32, whose products run as TF32 or not by a switch of
        torch's that is no setting of ours.
    """
    if precision == "fp32" or " MIG " in device_name:
        return None
    peak = next((peak for name, peak in PEAKS if name in device_name), None)
    if peak is None:
        return None
    return peak.bf16 if precision == "bf16" else peak.fp8
