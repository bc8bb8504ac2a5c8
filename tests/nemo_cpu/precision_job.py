"""What `test_precision_table.py` looks at, found on one rank of its own: NeMo's imports and the CPU backend stay out of the tests'."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

FP8_FIELDS = (
    *("fp8", "fp8_recipe", "fp8_param", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"),
    *("fp8_dot_product_attention", "fp8_multi_head_attention", "first_last_layers_bf16"),
    *("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
)


def configs(run: Any, spec: Any, folder: Path) -> dict[str, Any]:
    """Megatron's three configs as NeMo's strategy leaves them for this run; nothing but the look at the machine is left out."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.transformer.transformer_config import TransformerConfig
    from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

    from asft_nemo.nemo.build import model_config, optimizer, strategy
    from asft_nemo.nemo.gpt_model import ASFTModel
    from asft_nemo.nemo.precision import precision_plugin

    model = ASFTModel(model_config(run, spec), optim=optimizer(run, 1))
    wired = strategy(run, folder, resuming=True)
    plugin = precision_plugin(run.precision)
    assert plugin is None or isinstance(plugin, MegatronMixedPrecision)
    if plugin is not None:
        wired._precision_plugin = plugin
    wired.connect(model)
    config: Any = model.config
    # Megatron's own validation is in __post_init__, which overriding fields does not run
    TransformerConfig(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(TransformerConfig)}
    )
    optim, ddp = model.optim.config, wired.ddp_config  # type: ignore[union-attr]
    return {
        **{name: str(getattr(config, name)) for name in FP8_FIELDS},
        "params_dtype": [str(config.params_dtype), str(optim.params_dtype)],
        "bf16": [config.bf16, optim.bf16],
        "masters": str(optim.main_params_dtype),
        "gradients_in_fp32": ddp.grad_reduce_in_fp32,
        "parameters_gathered_in_fp8": ddp.fp8_param_gather,
        "optimizer_recipe": [optim.fp8_recipe, optimizer(run, 1).config.fp8_recipe],
        "layers_in_fp8": [
            config.fp8 is not None and not is_first_last_bf16_layer(config, n)
            for n in range(config.num_layers)
        ],
    }


def outside() -> dict[str, bool]:
    """Where Megatron opens FP8 contexts: in the block of layers, and nowhere on the way from its end to the loss."""
    from megatron.core.models.gpt import gpt_model
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_block import TransformerBlock

    from asft_nemo.nemo.head import LossHead

    forward = inspect.getsource(TransformerBlock.forward)
    return {
        "layers_first": 0 < forward.index("get_fp8_context(") < forward.index("self.final_layernorm"),
        # the `with` of the layers is one level deep, the norm after it is back at the body's
        "norm_after_the_context": "\n        if self.final_layernorm is not None:" in forward,
        "model_opens_none": "get_fp8_context" not in inspect.getsource(gpt_model),
        "head_is_megatrons": issubclass(LossHead, ColumnParallelLinear),
    }


def everything(model: str, folder: str) -> dict[str, Any]:
    """For a Hugging Face directory and an empty folder."""
    from jobs import run_config

    from asft_nemo.config.fp8 import FP8
    from asft_nemo.model import read_model_spec
    from asft_nemo.nemo.precision import PRECISIONS

    spec, found = read_model_spec(model), {}
    for name in (name for name in PRECISIONS if name != "fp8"):
        for distributed in (False, True):
            run = run_config(
                {
                    "model.path": model,
                    "objective.name": "sft",
                    "precision": name,
                    "optim.distributed": distributed,
                }
            )
            found[f"{name} {distributed}"] = configs(run, spec, Path(folder))
    needs = {name: row.fp8 is FP8.get(name) for name, row in PRECISIONS.items()}
    return {"configs": found, "outside": outside(), "needs": needs}
