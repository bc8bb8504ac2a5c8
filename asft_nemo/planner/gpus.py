"""GPUs that runs are planned for."""

from __future__ import annotations

from dataclasses import dataclass

from asft_nemo.config.devices import PEAKS, Peak
from asft_nemo.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One kind.

    Attributes:
        name: of the option `--gpu`.
        device: its row in `asft_nemo.config.devices.PEAKS`.
        memory: bytes that the driver offers.
        fp32: products outside its tensor cores, which torch takes for fp32 unless told otherwise, 10^12 operations a second.
        memory_bandwidth: of its HBM, bytes a second.
        node_bandwidth: NVLink to the other GPUs of its node, bytes a second and direction.
        network_bandwidth: to other nodes, bytes a second and direction: one 400 Gbit/s adapter a GPU (200 in A100 nodes), as NVIDIA's
            own DGX systems have.
    """

    name: str
    device: str
    memory: int
    fp32: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float

    @property
    def peak(self) -> Peak:
        """Its products, in 10^12 operations a second."""
        return dict(PEAKS)[self.device]


# NVIDIA's data sheets of the SXM modules; memory as nvidia-smi tells it (81559, 143771, 81920 and 40960 MiB)
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80gb", "H100", 81559 * 2**20, 66.9, 3.35e12, 450e9, 50e9),
        Gpu("h200", "H200", 143771 * 2**20, 66.9, 4.8e12, 450e9, 50e9),
        Gpu("a100-80gb", "A100", 81920 * 2**20, 19.5, 2.04e12, 300e9, 25e9),
        Gpu("a100-40gb", "A100", 40960 * 2**20, 19.5, 1.56e12, 300e9, 25e9),
    )
}


def gpu(name: str) -> Gpu:
    """The row called `name`, in capitals or not.

    Raises:
        UserError: no such row.
    """
    if name.lower() not in GPUS:
        raise UserError(f"unknown GPU '{name}': set --gpu to one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
