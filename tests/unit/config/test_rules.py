"""Every rule fires on what it is about, says the cure, and is silent otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from asft_nemo.config import tables
from asft_nemo.config.model_shape import ModelShape, read_model_shape
from asft_nemo.config.rules import check
from asft_nemo.config.run_folder import model_source
from asft_nemo.config.schema import RunConfig, replace, walk
from asft_nemo.errors import ConfigError
from asft_nemo.objectives.table import OBJECTIVES

Configure = Callable[..., RunConfig]
Violations = Callable[..., tuple[str, ...]]

ONE_RULE = [
    (
        ["objective=asft", "reference=none"],
        "kl_weight=0.05 needs a reference, got reference=none: set reference=resident, or objective=dft if you want no anchor",
    ),
    (["objective=sft_kl", "reference=none"], "or objective=sft if you want no anchor"),
    (
        ["objective=dft", "reference=resident"],
        "reference=resident was asked for but objective=dft reads none",
    ),
    (["objective=sft", "objective.kl_weight=0.1"], "objective.kl_weight does nothing with objective=sft"),
    (
        ["objective=dft", "objective.kl_direction=reverse"],
        "objective.kl_direction does nothing with objective=dft",
    ),
    (["objective=asft", "objective.alpha=0.1"], "objective.alpha does nothing with objective=asft"),
    (["objective.name=asfd"], "unknown objective 'asfd': did you mean 'asft'?"),
    (["objective=asft", "objective.kl_direction=backward"], "set one of forward, reverse"),
    (
        ["objective=asft", "objective.kl_weight=-1"],
        "objective.kl_weight=-1.0 is out of range: set a value of at least 0",
    ),
    (["objective=asft", "objective.kl_weight=inf"], "objective.kl_weight=inf is out of range"),
    (["objective=asft", "objective.kl_weight=nan"], "objective.kl_weight=nan is out of range"),
    (["objective=asft", "precision=fp16"], "precision=fp16 is not supported: its smallest numbers vanish"),
    (["objective=asft", "data.template=alpacca"], "set one of alpaca, chat, raw"),
    (["objective=asft", "data.on_too_long=cut"], "set one of drop, truncate, fail"),
    (["objective=asft", "trainer.keep=all"], "trainer.keep=all is unknown: set last:N"),
    (["objective=asft", "trainer.keep=last:0"], "trainer.keep=last:0 is unknown"),
    (["objective=asft", "trainer.keep=best:"], "trainer.keep=best: is unknown"),
    (["objective=asft", "optim.lr=0"], "optim.lr=0.0 is out of range: set a value of more than 0"),
    (["objective=asft", "optim.warmup_ratio=2"], "at least 0 and at most 1"),
    (
        ["objective=asft", "parallel.tp_size=4"],
        "tp_size=4 does not divide the model's 2 key/value heads: set one of 1, 2",
    ),
    (
        ["objective=asft", "parallel.pp_size=3", "trainer.global_batch_size=6"],
        "pp_size=3 does not divide the model's 4 layers",
    ),
    (
        ["objective=asft", "parallel.pp_size=2", "parallel.vpp_size=3"],
        "pp_size=2 x vpp_size=3 does not divide the model's 4 layers: choose them so that their product is one of 1, 2, 4",
    ),
    (["objective=asft", "parallel.vpp_size=2"], "parallel.vpp_size=2 needs pipeline stages, got pp_size=1"),
    (["objective=asft", "parallel.pp_size=2", "parallel.vpp_size=1"], "parallel.vpp_size=1 is out of range"),
    (
        ["objective=asft", "parallel.pp_size=2", "parallel.vpp_size=2", "trainer.global_batch_size=6"],
        "needs a multiple of pp_size=2 micro batches a step, got 3: set trainer.global_batch_size=8",
    ),
    (["objective=asft", "parallel.sequence_parallel=true"], "does nothing at tp_size=1"),
    (
        [
            "objective=asft",
            "parallel.sequence_parallel=true",
            "parallel.tp_size=2",
            "data.sequence_length=63",
        ],
        "data.sequence_length=63 is not a multiple of tp_size=2",
    ),
    (
        ["objective=asft", "data.sequence_length=4096"],
        "data.sequence_length=4096 exceeds the model's 2048 positions",
    ),
    (
        ["objective=asft", "trainer.global_batch_size=7"],
        "trainer.global_batch_size=7 is not a multiple of micro_batch_size x data-parallel size = 2 x 1 = 2: "
        "set trainer.global_batch_size=8",
    ),
    (
        ["objective=asft", "run.world_size=8", "trainer.global_batch_size=8"],
        "data-parallel size = 2 x 8 = 16",
    ),
    (
        ["objective=asft", "parallel.tp_size=2", "run.world_size=3"],
        "run.world_size=3 is not a multiple of tp_size x pp_size x cp_size = 2 x 1 x 1 = 2: set run.world_size=2",
    ),
    (
        ["objective=asft", "run.world_size=4096", "trainer.global_batch_size=8192"],
        "more ranks than this machine can run",
    ),
    (["objective=asft", "trainer.max_steps=3", "trainer.epochs=2"], "give one of them"),
    (
        ["objective=asft", "loss.implementation=vocab_parallel", "loss.chunk_tokens=64"],
        "loss.chunk_tokens does nothing with loss.implementation=vocab_parallel",
    ),
    (["objective=asft", "peft.rank=4"], "peft.rank does nothing with peft=none"),
    (
        ["objective=asft", "parallel.tp_size=2", "optim.overlap_grad_reduce=true"],
        "optim.overlap_grad_reduce does nothing with one data-parallel rank",
    ),
    (["objective=asft", "reference.cache_dir=x"], "reference.cache_dir does nothing with reference=resident"),
    (
        ["objective=sft", "reference.max_initial_kl=1"],
        "reference.max_initial_kl does nothing with reference=none",
    ),
    (["objective=asft", "eval.limit=3"], "eval.limit does nothing with asft train"),
    (["objective=asft", "trainer.validate_every=5"], "has nothing to measure: set data.validation"),
    (["objective=asft", "data.train=[]"], "data.train is empty"),
    (["objective=asft", "data.train=[missing.jsonl]"], "data file missing.jsonl does not exist"),
    (["objective=asft", "model.path=missing"], "model.path=missing is not a directory"),
    (["objective=asft", "trainer.resume=must"], "has no checkpoint: correct run.dir"),
    (
        ["objective=iw_sft", "reference=none"],
        "objective=iw_sft needs a reference, got reference=none: set reference=resident",
    ),
    (
        ["objective=asft", "reference=adapter_disabled"],
        "peft=none has none: set peft=lora, or reference=resident",
    ),
    (
        ["objective=asft", "precision=bf16", "reference.precision=fp8"],
        "reference.precision=fp8 needs a GPU and Transformer Engine, and this run has no GPU and no Transformer Engine: set "
        "reference.precision=policy",
    ),
    (
        ["objective=asft", "reference=cached", "reference.precision=fp8"],
        "reference.precision=fp8 beside precision=fp32 would measure FP8's rounding with a policy that has none: set precision=bf16",
    ),
    (
        ["objective=asft", "peft=lora", "reference=adapter_disabled", "reference.precision=fp8"],
        "reference.precision=fp8 needs weights of its own, and reference=adapter_disabled runs the policy's",
    ),
    (["objective=sft", "reference.precision=fp8"], "reference.precision does nothing with reference=none"),
    (
        ["objective=asft", "trainer.micro_batch_size=2", "reference.micro_batch_size=3"],
        "reference.micro_batch_size=3 is not a multiple of trainer.micro_batch_size=2: set reference.micro_batch_size=4",
    ),
    (["objective=asft", "reference.fill=first_epoch"], "reference.fill does nothing with reference=resident"),
    (["objective=psft", "peft=lora"], "objective=psft with peft=lora is not available yet"),
    (
        ["objective=asft", "peft=lora", "peft.targets=[linear_q]"],
        "peft.targets=[linear_q] does not name linear layers, each once: choose from linear_qkv, linear_proj",
    ),
    (["objective=asft", "peft=lora", "peft.targets=[]"], "peft.targets=[] does not name linear layers"),
    (
        ["objective=asft", "peft=lora", "reference=adapter_disabled", "reference.precision=bf16"],
        "reference.precision=bf16 needs weights of its own, and reference=adapter_disabled runs the policy's",
    ),
    (
        ["objective=asft", "peft=lora", "peft.rank=3", "parallel.tp_size=2"],
        "peft.rank=3 is not a multiple of parallel.tp_size=2, which divides the adapters: set peft.rank=4",
    ),
    (["objective=asft", "peft.adapter=x"], "peft.adapter does nothing with peft=none"),
    (
        ["objective=asft", "peft=lora", "peft.adapter=x"],
        "peft.adapter=x is no directory with an adapter_config.json",
    ),
    (["objective=asft_sft", "objective.alpha=-1"], "objective.alpha=-1.0 is out of range"),
    (["objective=psft", "objective.clip_low=2"], "objective.clip_low=2.0 is out of range"),
    (
        ["objective=asft", "data.packing=true", "trainer.micro_batch_size=2"],
        "a packed row is a micro batch already",
    ),
    (
        [
            "objective=asft",
            "data.packing=true",
            "trainer.micro_batch_size=1",
            "reference.micro_batch_size=4",
        ],
        "reference.micro_batch_size cannot be used with data.packing=true",
    ),
    (
        ["objective=asft", "data.weights=[1]"],
        "data.weights has nothing to blend, for data.train has one entry: leave data.weights out",
    ),
    (
        ["objective=asft", "data.fields.prompt=q"],
        "data.fields names some fields and not the others: set data.fields.response too",
    ),
    (
        ["objective=asft", "data.fields.input=x"],
        "not the others: set data.fields.prompt and data.fields.response too",
    ),
    (
        ["objective=asft", "data=gsm8k", "data.fields.messages=m"],
        "data.fields.messages names a whole conversation: leave out data.fields.prompt, input and response",
    ),
    (["objective=asft", "trainer.keep=best:validation_nll"], "needs validations: set data.validation"),
    (
        ["objective=asft", "data.max_bad_rows=3"],
        "data.max_bad_rows does nothing with data.on_bad_row=fail",
    ),
    (
        ["objective=asft", "data.on_bad_row=skip", "data.max_bad_rows=0"],
        "data.max_bad_rows=0 is out of range",
    ),
    (
        ["objective=asft", "trainer.max_skips=3"],
        "trainer.max_skips does nothing with trainer.on_nonfinite=stop",
    ),
    (
        ["objective=asft", "trainer.on_nonfinite=skip", "trainer.max_skips=0"],
        "trainer.max_skips=0 is out of range",
    ),
    (
        ["objective=asft", "precision=fp8_current"],
        "precision=fp8_current needs a GPU and Transformer Engine, and this run has no GPU",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), ONE_RULE, ids=[" ".join(row[0]) for row in ONE_RULE])
def test_one_mistake_gives_one_sentence(violations: Violations, overrides: list[str], sentence: str) -> None:
    found = violations(*overrides)
    assert len(found) == 1, found
    assert sentence in found[0]
    assert re.search(
        r": (\w+ )*(set|leave|give|lower|correct|choose|did you mean|a Hugging)|one of them", found[0]
    )


def test_no_bound_on_the_first_kl_of_adapters_that_were_trained_before(
    violations: Violations, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").touch()
    settings = ["objective=asft", "peft=lora", f"peft.adapter={tmp_path}"]
    assert violations(*settings) == ()
    (sentence,) = violations(*settings, "reference.max_initial_kl=1")
    assert sentence == "reference.max_initial_kl does nothing with peft.adapter: leave it out"


def test_every_feature_not_available_is_tested() -> None:
    said = " ".join(sentence for _, sentence in ONE_RULE)
    for row in tables.NOT_YET:
        assert row.feature.split(" in ")[-1].split(" with ")[-1] in said


GOOD = [
    ["objective=sft"],
    ["objective=dft"],
    ["objective=sft_kl", "objective.kl_direction=reverse"],
    ["objective=asft", "reference=resident"],
    ["objective=asft", "reference=offloaded", "reference.micro_batch_size=4", "reference.precision=bf16"],
    ["objective=asft", "reference=cached", "reference.fill=first_epoch", "reference.cache_dir=x"],
    ["objective=asft", "precision=bf16", "reference=cached", "reference.precision=fp8"],  # filled elsewhere
    ["objective=asft", "objective.kl_weight=0", "reference=none"],
    ["objective=asft", "precision=bf16", "run.world_size=2"],
    ["objective=asft", "parallel.tp_size=2", "parallel.pp_size=2", "parallel.vpp_size=2", "parallel.sequence_parallel=true"],
    ["objective=asft", "data.on_bad_row=skip", "data.max_bad_rows=3"],
    ["objective=asft", "trainer.on_nonfinite=skip", "trainer.max_skips=3"],
    ["objective=asft", "trainer.resume=if_exists", "trainer.checkpoint_every=2", "trainer.keep=last:3"],
    ["objective=asft", "loss.implementation=dense", "loss.normalize_by=micro_batch"],
    ["objective=asft", "peft=lora", "reference=adapter_disabled", "parallel.tp_size=2", "parallel.pp_size=2"],
    ["objective=asft", "peft=lora", "peft.rank=4", "peft.targets=[linear_qkv]", "reference=resident"],
    ["objective=asft", "data.template=chat", "data.loss_on=all_assistant", "data.fields.messages=dialogue"],
    ["objective=asft", "data.template=raw", "data.on_too_long=truncate", "data.loss_on=all", "data.on_bad_row=skip"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", GOOD, ids=[" ".join(row) for row in GOOD])
def test_good_settings_pass(violations: Violations, overrides: list[str]) -> None:
    assert violations(*overrides) == ()


def test_all_violations_come_together(violations: Violations) -> None:
    found = violations(
        "objective=asft",
        "reference=none",
        "parallel.tp_size=4",
        "optim.lr=-1",
        "data.train=[missing.jsonl]",
        "trainer.keep=all",
    )
    assert len(found) == 5


def test_chunk_tokens_is_auto_or_a_number(violations: Violations) -> None:
    fused = ("objective=asft", "loss.implementation=fused")
    for value in ("some", "0"):
        assert (
            f"loss.chunk_tokens={value} is unknown: set auto"
            in violations(*fused, f"loss.chunk_tokens={value}")[0]
        )
    assert violations(*fused, "loss.chunk_tokens=4096") == ()


def test_chunk_tokens_serve_the_prepass_of_any_loss(violations: Violations) -> None:
    for name in ("iw_sft", "psft"):
        run = (f"objective={name}", "loss.implementation=vocab_parallel")
        assert violations(*run, "loss.chunk_tokens=64") == ()
        assert "loss.chunk_tokens=0 is unknown" in violations(*run, "loss.chunk_tokens=0")[0]
    assert violations("objective=psft", "trainer.micro_batch_size=2", "reference.micro_batch_size=4") == ()


def test_ranges_of_options_are_those_of_the_objectives() -> None:
    from asft_nemo.objectives import OBJECTIVES

    of_table = {
        f"objective.{name}": (option.minimum, option.maximum, True)
        for row in OBJECTIVES.values()
        for name, option in row.options.items()
        if name in tables.OPTIONS
    }
    assert {key: tables.RANGES[key] for key in of_table} == of_table
    assert len(of_table) == len(tables.OPTIONS)


def test_validation_file_needs_a_step_count(violations: Violations, data_file: Path) -> None:
    assert violations("objective=asft", f"data.validation=[{data_file}]") == (
        "data.validation does nothing without trainer.validate_every: set trainer.validate_every=<steps>",
    )
    assert violations("objective=asft", f"data.validation=[{data_file}]", "trainer.validate_every=2") == ()


def test_run_dir_of_another_run_is_refused(violations: Violations, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    [sentence] = violations("objective=asft")
    assert "holds another run: choose another run.dir" in sentence
    assert violations("objective=asft", "trainer.resume=if_exists") == ()
    (tmp_path / "run" / "checkpoints" / "latest").mkdir(parents=True)
    assert violations("objective=asft", "trainer.resume=must") == ()


def test_a_base_of_another_model_is_refused_before_anything_starts(
    violations: Violations, tmp_path: Path, model_dir: Path
) -> None:
    context = tmp_path / "run" / "base" / "context"
    context.mkdir(parents=True)
    (context / "asft.json").write_text('{"source": {"path": "/models/other", "weights": []}}')
    (sentence,) = violations("objective=sft")
    assert (
        f"was made from /models/other, and model.path={model_dir}: choose another run.dir, or remove"
        in sentence
    )
    (context / "asft.json").write_text(json.dumps({"source": model_source(model_dir)}))
    assert violations("objective=sft") == ()


def test_run_dir_that_is_a_file_is_refused(violations: Violations, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert "is a file: give a directory" in violations("objective=asft")[0]


def test_sizes_are_taken_from_a_shape_without_any_file(configure: Configure) -> None:
    run = replace(
        configure("objective=asft"), {"parallel.tp_size": 8, "run.world_size": 8, "model.path": "nowhere"}
    )
    check(run)
    shape = ModelShape(4, 256, 4, 2, 512, 512, 2048)
    with pytest.raises(ConfigError, match="4 attention heads"):
        check(run, shape=shape)


def test_shape_of_a_nemo_checkpoint_is_found(model_dir: Path, tmp_path: Path) -> None:
    inside = tmp_path / "ckpt" / "context" / "hf"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text((model_dir / "config.json").read_text())
    assert (
        read_model_shape(tmp_path / "ckpt")
        == read_model_shape(model_dir)
        == ModelShape(4, 256, 4, 2, 512, 512, 2048)
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps({"num_hidden_layers": 4}), "has no hidden_size"),
    ],
)
def test_unusable_model_configs_are_explained(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_model_shape(tmp_path)


def test_heads_stand_in_for_missing_kv_heads(model_dir: Path) -> None:
    values = json.loads((model_dir / "config.json").read_text())
    del values["num_key_value_heads"]
    (model_dir / "config.json").write_text(json.dumps(values))
    assert read_model_shape(model_dir).num_query_groups == 4


def test_tables_name_settings_that_exist() -> None:
    keys = {key for key, _ in walk(RunConfig())}
    assert set(tables.CHOICES) <= keys
    assert set(tables.RANGES) <= keys
    assert {f"objective.{option}" for option in tables.OPTIONS} <= keys


def test_every_default_is_allowed() -> None:
    for key, value in walk(RunConfig()):
        if key in tables.CHOICES and value not in (None, "???"):
            assert value in tables.CHOICES[key]


def test_objective_facts_are_the_objective_tables() -> None:
    assert list(tables.OBJECTIVES) == list(OBJECTIVES)
    for name, facts in tables.OBJECTIVES.items():
        row = OBJECTIVES[name]
        assert facts.has_divergence == (row.direction is not None) == ("ref_hidden" in row.reads)
        assert facts.reads_ref_labels == ("ref_label_logprob" in row.reads)
        assert facts.whole_sequences == (row.scope == "sequence")
        assert facts.options == tuple(row.options)
        if facts.without:
            assert OBJECTIVES[facts.without].reads == row.reads - {"ref_hidden"}
            assert OBJECTIVES[facts.without].weight is row.weight


def test_overlapped_gathers_need_the_distributed_optimizer(violations: Violations) -> None:
    gather, reduce, distributed = (
        f"optim.{name}=true" for name in ("overlap_param_gather", "overlap_grad_reduce", "distributed")
    )
    for given in ([gather], [gather, reduce], [gather, distributed]):
        (sentence,) = violations("objective=asft", "run.world_size=2", *given)
        assert "set optim.distributed=true and optim.overlap_grad_reduce=true" in sentence
    assert not violations("objective=asft", "run.world_size=2", gather, reduce, distributed)


@pytest.mark.parametrize(("length", "refused"), [(48, False), (49, True)])
def test_sequences_longer_than_the_attention_window_are_refused(
    violations: Violations, model_dir: Path, length: int, refused: bool
) -> None:
    values = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(
        json.dumps(values | {"model_type": "mistral", "sliding_window": 48})
    )
    found = violations("objective=asft", f"data.sequence_length={length}")
    assert len(found) == refused
    assert all("exceeds the 48 tokens that the model attends to" in sentence for sentence in found)
