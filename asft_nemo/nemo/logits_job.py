"""A checkpoint's logits on given tokens, by the Megatron model of a layout: what `asft verify` compares with transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file, save_file

from asft_nemo.checkpoint.safetensors_io import SafetensorsReader
from asft_nemo.config.schema import RunConfig
from asft_nemo.hang_watch import at
from asft_nemo.model import ModelSpec
from asft_nemo.nemo.cache import this_place
from asft_nemo.nemo.cache_job import frozen_model_config, start_ranks
from asft_nemo.nemo.precision import precision_row
from asft_nemo.reference.cached import whole_sequence
from asft_nemo.reference.resident import ResidentReference


def write_logits(
    run: RunConfig, *, spec: ModelSpec, hf_dir: Path, weights_dir: Path, tokens_file: Path, out_file: Path
) -> None:
    """Runs the checkpoint forward, one sequence a micro batch, and writes the logits. Called on every rank.

    Args:
        run: layout and precision; `data.sequence_length` is that of the tokens.
        spec: architecture of the checkpoint.
        hf_dir: its export, whose logits these are compared with.
        weights_dir: its torch distributed checkpoint.
        tokens_file: safetensors with `tokens`, int64 [N, S].
        out_file: safetensors with `logits_0` to `logits_<N-1>`, each [S, V] in the run's compute dtype, without padding of the vocabulary;
            written by one rank.
    """
    start_ranks(run)
    at("loading the checkpoint", may_take_long=True)
    config = frozen_model_config(run, spec)
    model = ResidentReference(
        lambda stage: config.build_chunk(vp_stage=stage, returns_hidden=True),
        vp_size=run.parallel.vpp_size,
        weights_dir=weights_dir,
        dtype=precision_row(run.precision).compute_dtype,
    )
    at("its passes over the tokens", may_take_long=True)  # all of them, for there are few
    _round_as_exported(model, hf_dir)
    tokens_NS = load_file(tokens_file)["tokens"].to(torch.cuda.current_device())
    position_ids = torch.arange(tokens_NS.shape[1], device=tokens_NS.device)[None]
    batches = [{"tokens": row_S[None], "position_ids": position_ids} for row_S in tokens_NS]
    hidden = model.hidden(batches, sequence_length=tokens_NS.shape[1], micro_batch_size=1)
    head_VH, place = model.head(), this_place(run)
    if head_VH is not None:
        found = {}
        for number, hidden_SBH in enumerate(hidden):
            logits_SV = whole_sequence(hidden_SBH, place)[:, 0] @ head_VH.t()
            whole_SV = gather_from_tensor_model_parallel_region(logits_SV)[:, : spec.vocab_size]
            found[f"logits_{number}"] = whole_SV.cpu().contiguous()
        if (
            place.tp_rank == 0
            and torch.distributed.get_rank() == torch.distributed.get_world_size() - run.parallel.tp_size
        ):
            save_file(found, out_file)
    torch.distributed.barrier()


@torch.no_grad()
def _round_as_exported(model: ResidentReference, hf_dir: Path) -> None:
    """Rounds the weights to the export's dtype: an fp32 run from a bf16 base is exported in bf16, and no computation gives that back.

    That each weight was rounded rightly is for `asft_nemo.checkpoint.verify`, bit by bit. An export in several dtypes is left as it is.
    """
    with SafetensorsReader(hf_dir) as reader:
        dtypes = {entry.dtype for entry in reader.tensors.values()}
    if len(dtypes) == 1:
        (stored,) = dtypes
        for chunk in model.chunks:
            for weight in chunk.parameters():
                weight.copy_(weight.to(stored))
