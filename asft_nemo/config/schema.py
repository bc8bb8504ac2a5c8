"""The settings of a run: plain dataclasses, the only home of defaults.

Hydra composes these classes as structured configs (see `asft_nemo.config.load`); `from_dict` turns the
result into one immutable `RunConfig`. Sections are mutable while they are being built and frozen
afterwards: assigning to a field of a frozen section raises, lists have become tuples, and the whole tree is
hashable and survives JSON unchanged (`to_dict`, `from_dict`).

Sizes count ranks, lengths count tokens, batch sizes count examples, `*_every` counts steps; None means what
the field's comment says. `REQUIRED` marks a field that has no default: a recipe, an experiment or the
command line gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from asft_nemo.config.section import REQUIRED, Section, build, plain, walk
from asft_nemo.config.section import describe_type as describe_type
from asft_nemo.config.section import hints as hints
from asft_nemo.errors import ConfigError

DERIVED = ("run.dir", "run.world_size")  # filled from other settings when not given


@dataclass(unsafe_hash=True)
class ObjectiveConfig(Section):
    """Which objective, and its options; an option left None is the objective's own default."""

    name: str = REQUIRED
    kl_weight: float = (
        0.05  # weight of the divergence to the reference, for objectives that have one (the paper's value)
    )
    kl_direction: str = "forward"  # forward = KL(ref||policy), reverse = KL(policy||ref)
    alpha: float | None = None
    temperature: float | None = None
    exponent: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    refresh_every: int | None = None  # steps


@dataclass(unsafe_hash=True)
class ReferenceConfig(Section):
    """How the frozen reference is held; always the base checkpoint the run started from."""

    form: str = REQUIRED  # none | adapter_disabled | resident | offloaded | cached
    precision: str = "policy"  # policy = the policy's own compute dtype
    cache_dir: str | None = None  # cached only; None = reference_cache in run.dir
    fill: str = "job"  # cached only: when the cache is written
    micro_batch_size: int | None = None  # None = the policy's
    max_initial_kl: float = 0.01  # nats per token at step 0, where the kernels differ; fp8 needs its own


@dataclass(unsafe_hash=True)
class PeftConfig(Section):
    """Parameter-efficient fine-tuning; the numbers are the paper's medical LoRA."""

    name: str = REQUIRED  # none | lora
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    adapter: str | None = None  # directory that peft saved, to start from; None = fresh adapters


@dataclass(unsafe_hash=True)
class LossConfig(Section):
    """How the loss is computed; no choice here changes what it is, except `normalize_by=micro_batch`."""

    implementation: str = "fused"  # fused | vocab_parallel | dense
    chunk_tokens: int | str = "auto"  # fused only: tokens per visit of the head
    normalize_by: str = "tokens"  # micro_batch replays the authors' averaging, for comparison only


@dataclass(unsafe_hash=True)
class ModelConfig(Section):
    """The base model."""

    path: str = REQUIRED  # Hugging Face directory or NeMo checkpoint


@dataclass(unsafe_hash=True)
class FieldsConfig(Section):
    """Names of the record's fields; all None = the first row of each file shows its form."""

    prompt: str | None = None
    input: str | None = None  # follows the prompt on a new line where it is not blank
    response: str | None = None
    messages: str | None = None  # instead: the field that holds a conversation


@dataclass(unsafe_hash=True)
class DataConfig(Section):
    """Where examples come from and how they become tokens."""

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # one per entry of `train`; empty = every example once an epoch
    weights_by: str = "samples"  # samples | tokens: what the weights are shares of
    when_exhausted: str = "repeat"  # repeat | stop: what `trainer.epochs` means with weights
    validation: tuple[str, ...] = ()
    template: str = "alpaca"  # alpaca | chat | raw
    templates: tuple[str, ...] = ()  # one per entry of `train`; empty = `template` for all
    validation_templates: tuple[str, ...] = ()  # one per entry of `validation`; empty = `template` for all
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    sequence_length: int = 2048
    packing: bool = False
    group_by_length: bool = False  # micro batches of similar lengths, padded to their longest example alone
    loss_on: str = "response"
    on_bad_row: str = "fail"  # fail | skip
    max_bad_rows: int = 100  # rows that on_bad_row=skip may skip, in all files of `train` or of `validation`
    on_too_long: str = "drop"  # drop | truncate | fail


@dataclass(unsafe_hash=True)
class ParallelConfig(Section):
    """The layout; data-parallel size is what remains of the world."""

    tp_size: int = 1
    pp_size: int = 1
    vpp_size: int | None = None  # virtual stages per pipeline rank; None = no interleaving
    cp_size: int = 1
    sequence_parallel: bool = False
    # Layers of the first and the last pipeline rank, all its virtual stages together; None = an equal share of what is left
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    # Instead: the embedding, and the loss with its head, count as one layer each where layers are shared out
    account_for_embedding: bool = False
    account_for_loss: bool = False
    # Gathers and scatters of sequence parallelism inside Transformer Engine's GEMMs (its userbuffers), instead of between them
    tp_comm_overlap: bool = False


@dataclass(unsafe_hash=True)
class RecomputeConfig(Section):
    """Activations that are computed again in backward instead of being kept; the names are Megatron's. The frozen reference keeps none."""

    granularity: str = "none"  # none | selective = parts of every layer | full = whole layers
    # selective only: core_attn = the attention's products, mlp = the feed-forward layer
    modules: tuple[str, ...] = ("core_attn",)
    # full only: uniform = all layers, in groups of num_layers that keep their input alone; block = the first num_layers of each stage
    method: str = "uniform"
    num_layers: int = 1


@dataclass(unsafe_hash=True)
class KernelsConfig(Section):
    """Kernels that change nothing but speed."""

    # auto = Transformer Engine's layers where it is installed, a GPU is there and precision is not fp32, else Megatron's own; local = those everywhere
    layers: str = "auto"
    # A linear layer's GEMM adds its weight gradient to Megatron's fp32 sum itself; None = where apex's kernel is installed
    gradient_accumulation_fusion: bool | None = None
    # One kernel each for the gated activation, for bias with dropout and residual, and, of Transformer Engine, for the rotary embedding;
    # CPU ranks have none of them
    fusions: bool = True


@dataclass(unsafe_hash=True)
class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = 2e-5
    schedule: str = "cosine"  # cosine | linear | constant, after a linear warm-up
    warmup_ratio: float = 0.1  # share of all steps
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0  # global norm; 0 = no clipping
    min_lr_ratio: float = 0.0  # the schedule ends at lr * min_lr_ratio
    distributed: bool = False  # optimizer state sharded over data-parallel ranks
    overlap_grad_reduce: bool = False  # over data-parallel ranks, while backward still runs
    overlap_param_gather: bool = False  # of the distributed optimizer: while the next forward already runs
    cpu_offload: float = 0.0  # of the distributed optimizer: share of masters and moments that host memory holds and CPUs update


@dataclass(unsafe_hash=True)
class TrainerConfig(Section):
    """How long, how much at once, and what is kept."""

    max_steps: int | None = None  # where given, it replaces `epochs`
    epochs: float = 1.0
    global_batch_size: int = 64
    micro_batch_size: int = 1
    validate_every: int | None = None  # None = never
    checkpoint_every: int | None = None  # None = only at the end
    keep: str = "last:1"  # last:N | best:metric
    resume: str = "never"  # never | if_exists | must
    on_nonfinite: str = "stop"  # stop | skip
    max_skips: int = 10  # steps of the whole run that on_nonfinite=skip may skip
    # steps:a-b writes where the time of these steps went to profile/ in run.dir; numbered from 1 as in metrics.jsonl; None = no profile
    profile: str | None = None
    # What `mfu` is a share of: 10^12 operations a second of one GPU in this precision; None = known by the GPU's name, else no `mfu`
    peak_tflops: float | None = None
    wandb: str | None = None  # [ENTITY/]PROJECT: also logs to Weights & Biases; None = not


@dataclass(unsafe_hash=True)
class AlarmsConfig(Section):
    """What a run warns of while it goes on; None = not looked for. Values that are not finite are `trainer.on_nonfinite`'s."""

    straggler_factor: float | None = (
        1.5  # a rank's work takes more than so many times the median of its peers
    )
    straggler_every: int = 20  # steps; the median of so many is a rank's, so that one slow step is none
    nll_factor: float | None = 2.0  # a step's nll is more than so many times the median of the last steps
    nll_window: int = 50  # steps
    max_kl: float | None = 1.0  # nats per token to the reference, on training data
    hang_seconds: float | None = (
        600.0  # a rank that gives no sign for so long, or stays behind the others, ends the run by name
    )


@dataclass(unsafe_hash=True)
class RunSection(Section):
    """Where this run writes, its seed, and the ranks it starts on this machine."""

    dir: str = REQUIRED  # derived when not given: runs/<experiment or recipe>-<objective>
    seed: int = 42
    world_size: int = REQUIRED  # derived when not given: tp_size * pp_size * cp_size


@dataclass(unsafe_hash=True)
class ClusterConfig(Section):
    """Where `asft launch` runs the stages; `asft train` runs here and reads none of it."""

    name: str = REQUIRED  # of the file in conf/cluster
    executor: str = "local"  # local = one stage after another on this machine | slurm
    partition: str | None = None
    account: str | None = None  # any word where the cluster keeps no accounts
    qos: str | None = None
    constraint: str | None = None
    time: str = "04:00:00"  # limit of every job: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS
    nodes: int | None = None  # of jobs with ranks; None = run.world_size / gpus_per_node
    gpus_per_node: int = 8  # ranks on a node, one for each GPU
    gpu: str | None = None  # which, for the planner; None = what the recipe is made for
    request_gpus: bool = True  # false where the cluster hands out whole nodes and knows no GPUs
    exclusive: bool = False  # whole nodes for jobs with ranks
    cpus_per_task: int | None = None
    mem: str | None = None  # of a node, as sbatch takes it; "0" = all of it
    cpu_partition: str | None = (
        None  # for stages that need no GPU, without constraint and qos; None = partition
    )
    pyxis: bool = False  # this cluster's srun has the --container-* options
    container_image: str | None = None  # a registry's image as Docker or pyxis writes it, or a .sqsh file
    eval_image: str | None = None  # likewise, for eval and compare; None = container_image
    # SOURCE:TARGET[:FLAGS]; the folders that the run's own settings name are mounted without being listed
    container_mounts: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()  # further words for srun
    sbatch_args: tuple[str, ...] = ()  # further NAME=VALUE for sbatch, for example mail-type=END
    env: tuple[str, ...] = ()  # NAME=VALUE, exported to every stage
    setup: tuple[
        str, ...
    ] = ()  # shell lines ahead of every stage on its node, for example "module load cuda"
    asft: str | None = None  # the command on the nodes; None = this Python, or `asft` in a container
    signal_seconds: int = 300  # training is told so long before the time limit to write a checkpoint
    max_requeues: int = 20  # a job that comes back more often, for whatever reason, fails


@dataclass(unsafe_hash=True)
class EvalConfig(Section):
    """How a model is evaluated: the defaults of `asft eval`."""

    suites: tuple[str, ...] = ()
    backend: str = "hf"  # hf | vllm (asft eval also asks servers: openai)
    protocol: str = "greedy"
    prompt: str | None = None  # prompt variant; None = each suite's own
    max_tokens: int | None = None  # of one completion; None = the protocol's own number
    batch_size: int | None = None  # prompts run together; None = the backend's own number
    tensor_parallel_size: int | None = None  # vllm: GPUs; None = all that can share the heads
    allow_code_execution: bool = False  # code suites run the programs that the model wrote, in a sandbox
    limit: int | None = None  # examples per suite; None = all
    drift: str | None = None  # file of held-out text on which KL to model.path is measured; None = it is not
    seed: int = 0  # of what a protocol draws


@dataclass(unsafe_hash=True)
class RunConfig(Section):
    """Everything a run is told. Immutable once it comes from `compose` or `from_dict`."""

    recipe: str = REQUIRED
    experiment: str | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    precision: str = "bf16"  # fp32 | bf16 | fp8_current | fp8_blockwise | fp8_delayed
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    run: RunSection = field(default_factory=RunSection)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def data_parallel_size(run: RunConfig) -> int:
    """Ranks left for data parallelism: world_size / (tp_size * pp_size * cp_size)."""
    layout = run.parallel
    return run.run.world_size // (layout.tp_size * layout.pp_size * layout.cp_size)


def num_microbatches(run: RunConfig) -> int:
    """Micro batches each data-parallel rank runs in one step."""
    return run.trainer.global_batch_size // (run.trainer.micro_batch_size * data_parallel_size(run))


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The run as plain JSON values (tuples become lists); `from_dict` gives the same run back."""
    return plain(run)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """An immutable run from nested plain values; what is not given keeps the schema's default.

    Args:
        values: nested mapping with the sections' keys, for example the `config` part of run.json.

    Raises:
        ConfigError: keys that do not exist, values of the wrong type, required settings that are missing.
    """
    problems: list[str] = []
    return _finished(build(RunConfig, values, "", problems), problems)


def _finished(run: RunConfig, problems: list[str]) -> RunConfig:
    """The run with what follows from other settings, immutable; ConfigError where there are problems or required settings are missing."""
    if not problems:
        _derive(run)
        problems = [f"{key} is not set: give {key}=..." for key, value in walk(run) if value == REQUIRED]
    if problems:
        raise ConfigError(problems)
    run.freeze()
    return run


def replace(run: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A copy of `run` with some dotted keys changed, for example `replace(run, {"run.dir": "runs/a"})`.

    Sections without a change are the same objects: they are immutable, and the planner makes hundreds of copies.
    """
    values: dict[str, Any] = {}
    for key, value in changes.items():
        *path, last = key.split(".")
        node = values
        for depth, part in enumerate(path):
            node = node.setdefault(part, {} if depth else plain(getattr(run, part, {})))
        node[last] = value
    problems: list[str] = []
    copy = build(RunConfig, values, "", problems)
    for item in fields(run):
        if item.name not in values:
            setattr(copy, item.name, getattr(run, item.name))
    return _finished(copy, problems)


def _derive(run: RunConfig) -> None:
    """Fills the settings whose default follows from other settings."""
    layout = run.parallel
    if run.run.world_size == REQUIRED:
        run.run.world_size = layout.tp_size * layout.pp_size * layout.cp_size
    if run.run.dir == REQUIRED and REQUIRED not in (run.recipe, run.objective.name):
        run.run.dir = f"runs/{run.experiment or run.recipe}-{run.objective.name}"
