"""A run at its full size on one CPU process, without weights, data or GPUs: what every rank would hold, counted tensor by tensor.

For the first rank of a pipeline stage, under torch's fake process group and on its meta device, the code of a run builds what it builds:
Megatron's config and its checks, this project's model with all virtual stages and adapters, NeMo's wrapper and Megatron's DDP, the
optimizer, the frozen reference. Then one micro batch goes forward and backward through each kind of chunk, the fused loss included, while
`asft_nemo.nemo.simulate.meter` counts the storages that are alive.

Not simulated: Transformer Engine (stand-ins keep what its layers keep, see `asft_nemo.nemo.simulate.stand_ins`), Triton (the loss takes its
PyTorch path, which holds one [chunk, V] buffer more where there is a divergence), FP8 (its bf16 twin stands for it), the allocator's
fragments, NCCL's buffers and the CUDA context.

It runs in a process of its own, because Megatron's state is the process's: ``python -m asft_nemo.nemo.simulate RUN CONFIG OUT``.
"""

from asft_nemo.nemo.simulate.run import Simulation, StageFigures, simulate

__all__ = ["Simulation", "StageFigures", "simulate"]
