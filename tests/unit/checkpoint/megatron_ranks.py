"""One of four gloo ranks: Megatron's own GPTModel at TP2 x PP2 loads an import, computes, and saves.

A job of test_megatron.py, with hf, ckpt and tokens.pt in every folder.
"""

import dataclasses
import json
from pathlib import Path

import torch
import torch.distributed as dist

TP_SIZE, PP_SIZE = 2, 2


def build_model(spec, kwargs, vocab_size):
    """Megatron's model with the local layer spec, in fp32 whatever the checkpoint's dtype."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    config = TransformerConfig(
        **{name: value for name, value in kwargs.items() if name in names},
        tensor_model_parallel_size=TP_SIZE,
        pipeline_model_parallel_size=PP_SIZE,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm),
        vocab_size=vocab_size,
        max_sequence_length=spec.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **{name: value for name, value in kwargs.items() if name not in names},
    )


def logits_of(model, tokens, spec):
    """Passes hidden states from the first stage to the last by hand; the last stage returns `[b, t, v]`, gathered."""
    from megatron.core import parallel_state

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    group = parallel_state.get_pipeline_model_parallel_group()
    with torch.no_grad():
        if parallel_state.is_pipeline_first_stage():
            hidden = model(tokens, positions, None)
            dist.send(hidden, parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
            return None
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], spec.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
        model.set_input_tensor(hidden)
        shard = model(tokens, positions, None)
    shards = [torch.empty_like(shard) for _ in range(TP_SIZE)]
    dist.all_gather(shards, shard, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, dim=-1)


def padding_rows(model, spec, vocab_size):
    """This rank's rows beyond the vocabulary, of embedding and head."""
    from megatron.core import parallel_state

    rows = vocab_size // TP_SIZE
    first = max(0, spec.vocab_size - rows * parallel_state.get_tensor_model_parallel_rank())
    named = dict(model.named_parameters())
    tables = [value for name, value in named.items() if name.startswith(("embedding", "output_layer"))]
    return [table.data[first:] for table in tables] if first < rows else []


def run_case(rank: int, folder: Path) -> None:
    """Loads FOLDER/ckpt, writes FOLDER/logits.pt and FOLDER/figures.RANK.json, saves FOLDER/trained."""
    from megatron.core import dist_checkpointing

    from asft_nemo.model import megatron_config_kwargs, padded_vocab_size, read_model_spec

    spec = read_model_spec(folder / "hf")
    vocab_size = padded_vocab_size(spec.vocab_size, tp_size=TP_SIZE)
    model = build_model(spec, megatron_config_kwargs(spec), vocab_size)
    asked = model.sharded_state_dict(prefix="module.")
    loaded = dist_checkpointing.load(asked, str(folder / "ckpt" / "weights"), strict="raise_unexpected")
    weights = {key: value for key, value in loaded.items() if key.startswith("module.")}
    model.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
    logits = logits_of(model, torch.load(folder / "tokens.pt"), spec)
    if rank == dist.get_world_size() - 1:
        torch.save(logits[..., : spec.vocab_size].clone(), folder / "logits.pt")
    padding = padding_rows(model, spec, vocab_size)
    figures = {
        "dtypes": sorted({str(v.dtype) for v in weights.values() if isinstance(v, torch.Tensor)}),
        "padding": max((rows.abs().max().item() for rows in padding), default=0.0),
        "padded": len(padding),
        "frequencies": model.rotary_pos_emb.inv_freq.tolist(),
    }
    (folder / f"figures.{rank}.json").write_text(json.dumps(figures))

    # As a training run leaves it: numbers in the padding rows, optimizer state beside the model's.
    for rows in padding:
        rows.fill_(7.0)
    saved = model.sharded_state_dict(prefix="module.")
    for key, value in model.sharded_state_dict(prefix="optimizer.state.exp_avg.module.").items():
        if "_extra_state" not in key:
            saved[key] = value
    if rank == 0:
        (folder / "trained" / "weights").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(saved, str(folder / "trained" / "weights"))
    dist.barrier()


def run_cases(folders: list[str]) -> None:
    """Every case on four ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(TP_SIZE, PP_SIZE)
    model_parallel_cuda_manual_seed(0)
    for folder in folders:
        run_case(dist.get_rank(), Path(folder))
