"""What all recipes share, and how a recipe becomes a NeMo-Run task.

A recipe takes the fastest layout that `asft plan --search` finds for its GPUs with 4 layers a virtual stage and without context parallelism,
among those that leave a tenth of the memory at 4,096 tokens. Three recipes cannot leave it there, and one of them has 2 layers a virtual stage: each says
so, and docs/planner.md has their numbers. Speeds and GiB beside the values are the planner's; none was measured on a GPU.

What recipes leave as the schema has it:

* `data.packing=false`: a global batch counts rows, and packed rows would make the paper's batches several times larger. An experiment may pack.
* `recompute.granularity=none`: every recipe but the one for 32,768 tokens has room for its activations.
* `parallel.tp_comm_overlap=false`: Transformer Engine's userbuffers have never run here, and FP8 with bf16 layers at both ends refuses them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import nemo_run


def fragment() -> dict[str, Any]:
    """Full fine-tuning; the reference is a second frozen model where the objective reads one."""
    return {"peft": {"name": "none"}, "reference": {"form": "resident"}}


def on_gpus() -> dict[str, Any]:
    """What every GPU recipe shares; the precision is the schema's bf16 with fp32 master weights."""
    return combine(
        fragment(),
        {
            "optim": {
                # fp32 master weights and two moments are 12 bytes a parameter: data-parallel ranks share them.
                "distributed": True,
                # Both hide what data-parallel ranks exchange behind backward and the next forward; losses stay the same bit for bit.
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            }
        },
    )


def tensor_parallel(tp_size: int) -> dict[str, Any]:
    """Tensor parallelism within a node.

    Sequence parallelism comes with it: it divides the activations between the GEMMs by `tp_size` too, for the same
    bytes on the wire.
    """
    return {"parallel": {"tp_size": tp_size, "sequence_parallel": True}}


def one_node(tp_size: int) -> dict[str, Any]:
    """Full fine-tuning on the 8 GPUs of one node, of which `tp_size` at a time hold one model."""
    return combine(on_gpus(), tensor_parallel(tp_size), {"run": {"world_size": 8}})


def pipeline_parallel(pp_size: int, *, vpp_size: int) -> dict[str, Any]:
    """Pipeline stages, over nodes or within one.

    Virtual stages divide the pipeline's idle time by `vpp_size`; with fewer than 4 layers each that gains 2 % at most.
    """
    return {"parallel": {"pp_size": pp_size, "vpp_size": vpp_size}}


def lora() -> dict[str, Any]:
    """Adapters on a frozen base, which is the reference for nothing while they are switched off.

    Where one GPU holds it, more are best spent on data parallelism.
    """
    return combine(on_gpus(), {"peft": {"name": "lora"}, "reference": {"form": "adapter_disabled"}})


def fp8(scaling: str) -> dict[str, Any]:
    """The layers' products in FP8, for H100 and H200.

    Args:
        scaling: `current`, one scale a tensor taken from its own numbers, the first and the last layer in bf16; `blockwise`, one a block of
            128. Delayed scaling, whose scales come from earlier steps, is no recipe's: a frozen reference has none.
    """
    return {"precision": f"fp8_{scaling}"}


def checkpointed(steps: int) -> dict[str, Any]:
    """A checkpoint every so many steps: a node that fails ends a run on several of them, which goes on from the last one.

    At 14 bytes a parameter one takes 1 TB for 72B, under two minutes at 10 GB/s, and all ranks wait for it: half an hour of steps between two
    is a loss that can be borne, for 6 % of the time. `trainer.keep=last:1` keeps one; while the next is written, two are on disk.
    """
    return {"trainer": {"checkpoint_every": steps}}


def full_70b() -> dict[str, Any]:
    """Full fine-tuning of the 70B models on 32 GPUs: 80 layers, hidden 8192, 64 heads and 8 kv heads are common to them."""
    return combine(
        on_gpus(),
        # 29 minutes by the plan, at 2,048 tokens
        checkpointed(300),
        # The whole node, and the most that 8 kv heads allow. TP 4 with 8 stages is faster by the plan and leaves less than
        # the tenth of the memory at 4,096 tokens.
        tensor_parallel(8),
        # Four nodes: on two, 18 bytes a parameter would be 78 GB of each GPU and more.
        pipeline_parallel(4, vpp_size=5),
    )


def lora_70b() -> dict[str, Any]:
    """LoRA of the 70B models on one node of 8 GPUs."""
    return combine(
        lora(),
        # TP 2 with four stages is faster by the plan and does not fit at 4,096 tokens: adapters keep the gathered tokens.
        tensor_parallel(4),
        # The other half of the node, instead of a second copy of the frozen weights.
        pipeline_parallel(2, vpp_size=10),
    )


def half_on_h200(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe for 80 GB on half as many GPUs of 141 GB.

    They leave room for half the tensor ranks, whose exchanges are not hidden; the stages stay.
    """
    return combine(recipe, tensor_parallel(recipe["parallel"]["tp_size"] // 2))


def combine(*fragments: Mapping[str, Any]) -> dict[str, Any]:
    """One fragment from several; later ones win, section by section."""
    result: dict[str, Any] = {}
    for values in fragments:
        for name, value in values.items():
            inside = result.get(name)
            if isinstance(value, Mapping) and isinstance(inside, Mapping):
                result[name] = combine(inside, value)
            else:
                result[name] = copy.deepcopy(value)
    return result


def finetune_recipe(module: str) -> Callable[..., nemo_run.Partial]:
    """The function of this name that every recipe has: `finetune_partial` with the recipe's name.

    Args:
        module: the recipe's `__name__`.
    """

    def task(overrides: Sequence[str] = ()) -> nemo_run.Partial:
        """This recipe as a NeMo-Run task; see `base.finetune_partial`."""
        return finetune_partial(module.rpartition(".")[2], overrides)

    return task


def finetune_partial(recipe: str, overrides: Sequence[str] = ()) -> nemo_run.Partial:
    """A NeMo-Run task that fine-tunes with `recipe` and the command line's overrides.

    Args:
        recipe: name of a module of this folder.
        overrides: as for `asft train`, for example `("objective=asft", "data.train=[a.jsonl]")`.

    Returns:
        `run.Partial(asft_nemo.train.train, ...)` whose argument is the whole configuration as nested
        `run.Config`s, so that `nemo_run`'s own overrides (`run.optim.lr=1e-5`) reach every setting.

    Raises:
        ConfigError: as `asft_nemo.config.load.compose`.
    """
    import nemo_run

    from asft_nemo.config.load import compose
    from asft_nemo.config.schema import Section
    from asft_nemo.train import train

    def as_config(value: Any) -> Any:
        if not isinstance(value, Section):
            return list(value) if isinstance(value, tuple) else value
        names = type(value).__dataclass_fields__  # type: ignore[attr-defined]
        return nemo_run.Config(type(value), **{name: as_config(getattr(value, name)) for name in names})

    composed = compose([f"recipe={recipe}", *overrides], check_inputs=False)
    return nemo_run.Partial(train, run=as_config(composed))
