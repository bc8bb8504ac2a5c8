"""What `test_reference_fp8.py` looks at, found on one rank of its own: NeMo's imports and the CPU backend stay out of the tests'."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def refused(run: Any, spec: Any) -> str:
    """What this machine answers."""
    from asft_nemo.errors import ConfigError
    from asft_nemo.nemo.cache_job import frozen_model_config

    try:
        frozen_model_config(run, spec)
    except ConfigError as error:
        return str(error)
    return ""


def configs(run: Any, spec: Any) -> dict[str, Any]:
    """The config that is built where FP8 can run: nothing but the look at the machine is replaced."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.transformer.transformer_config import TransformerConfig
    from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

    from asft_nemo.nemo import references
    from asft_nemo.nemo.build import model_config
    from asft_nemo.nemo.cache_job import frozen_model_config
    from asft_nemo.nemo.precision import PRECISIONS, precision_plugin, reference_precision

    references.require_kernels = lambda name: None
    plugin: Any = precision_plugin(run.precision)
    policy = update_config_with_dtype_overrides(plugin.dtype_config, model_config(run, spec))
    before, serialised = copy.copy(vars(policy)), copy.deepcopy(policy.__io__)
    reference = references.reference_config(run, policy)
    in_job = frozen_model_config(run, spec)

    names = [field.name for field in dataclasses.fields(TransformerConfig)]
    # Megatron's own validation is in __post_init__, which overriding fields does not run
    checked = TransformerConfig(**{name: getattr(reference, name) for name in names})
    assert (checked.fp8, checked.fp8_param) == (reference.fp8, reference.fp8_param)
    shown = (
        *("fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16", "num_layers_at_start_in_bf16"),
        *("num_layers_at_end_in_bf16", "fp8_dot_product_attention", "fp8_multi_head_attention"),
        *("bf16", "params_dtype", "pipeline_dtype", "autocast_dtype"),
    )
    return {
        "reference": {name: str(getattr(reference, name)) for name in shown},
        "policy_fp8": [str(policy.fp8), policy.fp8_param],
        "policy_changed": [name for name, value in before.items() if getattr(policy, name) is not value],
        "policy_serialised_alike": serialised == policy.__io__,
        "job_differs_in": [n for n in names if str(getattr(in_job, n)) != str(getattr(reference, n))],
        "layers_in_bf16": [is_first_last_bf16_layer(reference, n) for n in range(reference.num_layers)],
        "row": [reference_precision(run), str(PRECISIONS[reference_precision(run)].compute_dtype)],
    }


def identity(run: Any, spec: Any) -> list[str]:
    """dtype and precision of a cache that such a reference fills; the fingerprints of files are not what is asked."""
    from asft_nemo.nemo import cache

    for name in ("weights", "tokenizer", "template", "files"):
        setattr(cache, f"{name}_fingerprint", lambda *_: "same")
    data = SimpleNamespace(train=SimpleNamespace(sample_ids=torch.arange(3)), validation=None)
    found = cache.cache_identity(run, spec=spec, data=data, base_dir=Path("base"))  # type: ignore[arg-type]
    return [found.dtype, found.precision]


def loading(run: Any, spec: Any, folder: Path) -> dict[str, Any]:
    """Chunks whose linear layers carry `_extra_state` as Transformer Engine's do, from a checkpoint that has none of it."""
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    from asft_nemo.nemo.cache_job import frozen_model_config, start_ranks
    from asft_nemo.reference.frozen import FrozenChunks

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{folder / 'rendezvous'}"
    )
    start_ranks(run)
    config = frozen_model_config(run, spec)

    def chunks() -> FrozenChunks:
        return FrozenChunks(
            lambda stage: config.build_chunk(vp_stage=stage, returns_hidden=True),
            vp_size=None,
            dtype=torch.bfloat16,
        )

    base, other = chunks(), chunks()
    differ = [not torch.equal(a, b) for a, b in zip(weights(base), weights(other), strict=True)]
    (folder / "weights").mkdir()
    dist_checkpointing.save(base.sharded_states()["chunk_0"], str(folder / "weights"))
    set_states: list[Any] = []
    RowParallelLinear.get_extra_state = lambda self: torch.ones(7, dtype=torch.uint8)
    RowParallelLinear.set_extra_state = lambda self, state: set_states.append(state)
    other = chunks()
    has = [key for key in other.chunks[0].state_dict() if key.endswith("_extra_state")]
    other.load_weights(folder / "weights")
    return {
        "differed_before": any(differ),
        "layers_with_extra_state": len(has),
        # Megatron's own linear layers hand themselves None whatever is loaded
        "extra_states_given": len([state for state in set_states if state is not None]),
        "equal_after": all(torch.equal(a, b) for a, b in zip(weights(base), weights(other), strict=True)),
        "embedding": str(other.chunks[0].embedding.word_embeddings.weight.dtype),  # type: ignore[union-attr]
        "head": str(other.head().dtype),  # type: ignore[union-attr]
    }


def weights(chunks: Any) -> list[torch.Tensor]:
    """All parameters of all chunks."""
    return [parameter for chunk in chunks.chunks for parameter in chunk.parameters()]


def parking() -> dict[str, Any]:
    """A weight that stands for bf16 and holds one byte a number, as Transformer Engine's do, leaves the device and comes back."""
    from asft_nemo.reference.frozen import stored_tensors
    from asft_nemo.reference.offloaded import OffloadedReference
    from asft_nemo.reference.pinned import PinnedMemory

    raw = torch.randint(
        0, 255, (320, 32), dtype=torch.uint8
    )  # with the bias two pages and a half: two blocks of host memory
    wanted = raw.clone()
    layer = nn.Linear(32, 320, dtype=torch.bfloat16)
    layer.weight.get_data_tensors = lambda: (raw, None)  # type: ignore[attr-defined]
    bias = layer.bias.detach().clone()
    reference: Any = object.__new__(OffloadedReference)
    reference._head_VH = None
    memory = PinnedMemory(raw.nbytes + layer.bias.nbytes)
    parked = reference._park(layer, memory)
    # where Transformer Engine keeps FP8 copies of weights from one micro batch to the next
    layer._fp8_workspaces = {"weight": torch.zeros_like(raw)}  # type: ignore[assignment]
    parked.leave()
    left = raw.untyped_storage().nbytes() + layer.bias.untyped_storage().nbytes()
    left += sum(kept.nbytes for kept in layer._fp8_workspaces.values())  # type: ignore[union-attr]
    parked.allocate()
    with torch.no_grad():
        parked.send(torch.cuda.current_stream())
    parked.wait()
    return {
        "stored_bytes": [sum(t.nbytes for t in stored_tensors(p)) for p in (layer.weight, layer.bias)],
        "host_bytes": [[part.nbytes for part in parts] for parts in parked.host],
        "host_blocks": memory.nbytes,
        "left_on_device": left,
        "back": torch.equal(raw, wanted) and torch.equal(layer.bias, bias),
    }


def everything(model: str, folder: str) -> dict[str, Any]:
    """For a Hugging Face directory and an empty folder."""
    from jobs import run_config

    from asft_nemo.model import read_model_spec

    spec = read_model_spec(model)
    run = run_config({"model.path": model, "objective.name": "asft", "precision": "bf16"})
    from asft_nemo.config.schema import replace

    fp8 = replace(run, {"reference.precision": "fp8"})
    found = {
        "refused": refused(fp8, spec),
        "not_refused": refused(run, spec),
        "configs": configs(fp8, spec),
        "identity": identity(fp8, spec),
        "parking": parking(),
        "loading": loading(fp8, spec, Path(folder)),
    }
    return found
