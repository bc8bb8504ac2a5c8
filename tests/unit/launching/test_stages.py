"""Which stages a launch has, what they wait for, and what they are told."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.paths import project_dir
from asft_nemo.config.schema import DataConfig
from asft_nemo.data.preparation import prepare_files
from asft_nemo.errors import UserError
from asft_nemo.launching.prepared import is_prepared
from asft_nemo.launching.stages import STAGES, Launch, Stage, build, choose, settings_of_ranks
from asft_nemo.launching.words import setting

EVERYTHING = list(STAGES)


def stages(
    words: Sequence[str], asked: Sequence[str] | None = None, *, folder: Path = Path("/run")
) -> list[Stage]:
    names, _ = choose(launch(words).run, asked)
    return build(launch(words, folder=folder, prepared="prepare" in names), names)


def launch(words: Sequence[str], *, folder: Path = Path("/run"), prepared: bool = True) -> Launch:
    run = compose(words, check_inputs=False, launched=True)
    return Launch(run=run, asft=("asft",), folder=folder, prepared=prepared)


def tiny(*words: str) -> list[str]:
    return ["experiment=tiny_gsm8k", "data.train=[a.jsonl]", *words]


def last_command(stage: Stage) -> list[str]:
    return shlex.split(stage.lines[-1].replace("\\\n", " "))


def test_a_cached_reference_and_suites_give_every_stage() -> None:
    found = stages(tiny("reference=cached", "eval.suites=[s.jsonl]"))
    assert [stage.name for stage in found] == EVERYTHING
    assert {stage.name for stage in found if stage.ranks} == {"cache-reference", "train"}
    assert {stage.name: stage.after for stage in found} == {
        "prepare": (),
        "import": (),
        "cache-reference": ("prepare", "import"),
        "train": ("prepare", "import", "cache-reference"),
        "export": ("train",),
        "verify": ("export",),
        "eval": ("export",),
        "compare": ("eval",),
    }


def test_what_does_not_apply_is_left_out_with_the_reason() -> None:
    run = compose(tiny(), check_inputs=False, launched=True)
    names, idle = choose(run, None)
    assert names == ["prepare", "import", "train", "export", "verify"]
    assert idle["compare"] == "eval.suites is empty: set eval.suites=[suite.jsonl]"
    assert "reference=resident" in idle["cache-reference"]


def test_what_awaits_a_judge_is_not_compared() -> None:
    for suites, text in (
        ("[alpaca_eval]", "asft eval judge"),
        ("[instruct]", "asft eval judge"),
        ("[instruct,medqa]", None),
    ):
        names, idle = choose(compose(tiny(f"eval.suites={suites}"), check_inputs=False, launched=True), None)
        assert "eval" in names
        assert (text in idle["compare"]) if text else ("compare" in names)


def test_held_out_text_is_read_by_the_base_and_by_what_became_of_it() -> None:
    (evaluate,) = stages(tiny("eval.drift=held.jsonl", "model.path=m"), ["eval"])
    for line in (evaluate.lines[0], evaluate.lines[-1]):
        words = shlex.split(line.replace("\\\n", " "))
        given = [Path(words[words.index(flag) + 1]).name for flag in ("--drift", "--base")]
        assert given == ["held.jsonl", "m"]
        assert "--suite" not in words
    (compare,) = stages(tiny("eval.drift=held.jsonl"), ["compare"])
    assert "--run asft=/run " in compare.lines[-1].replace("\\\n", " ")


def test_a_second_launch_evaluates_the_base_like_the_model_whatever_is_there(tmp_path: Path) -> None:
    done = tmp_path / "eval" / "base" / "results.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    (evaluate,) = stages(tiny("eval.suites=[other.jsonl]", "model.path=m"), ["eval"], folder=tmp_path)
    assert "if [ -e" not in "".join(evaluate.lines)
    of_base, of_model = (shlex.split(line) for line in (evaluate.lines[0], evaluate.lines[-1]))
    assert of_base[3:-1] == of_model[3:-1], "alike but for the model and the folder"
    assert of_base[-1] == str(done.parent)


def test_merged_adapters_are_exported_and_not_held_against_the_checkpoint() -> None:
    found = {stage.name: stage for stage in stages(tiny("peft=lora", "reference=adapter_disabled"))}
    assert "verify" not in found
    assert found["export"].lines[-1].count("--adapters merge") == 1


def test_a_subset_waits_through_what_is_left_out() -> None:
    words = tiny("reference=cached", "eval.suites=[s.jsonl]")
    found = {stage.name: stage.after for stage in stages(words, ["import", "export", "compare"])}
    assert found == {"import": (), "export": ("import",), "compare": ("export",)}


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["trian"], "unknown stage 'trian': did you mean 'train'?"),
        (["train", "cache-reference"], "stage cache-reference does nothing here (reference=resident"),
        (["eval"], "stage eval does nothing here (eval.suites is empty: set eval.suites=[suite.jsonl])"),
    ],
)
def test_wrong_stages_are_refused(asked: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        stages(tiny(), asked)
    assert sentence in str(caught.value)


def test_training_reads_the_settings_that_were_launched() -> None:
    words = tiny("cluster=slurm_sandbox", "run.world_size=4", "objective.kl_weight=0.1", "cluster.time=20")
    train = next(stage for stage in stages(words) if stage.name == "train")
    assert last_command(train) == "exec asft train --settings /run/launch/settings.json".split()  # noqa: SIM905
    run = settings_of_ranks(launch(words))
    assert run.cluster.name == "local", "a rank is told nothing of the cluster"
    assert (run.objective.kl_weight, run.run.world_size, run.run.dir) == (0.1, 4, "/run")
    assert run.data.train == ("/run/data/a",)
    assert run.trainer.resume == "if_exists"


def test_prepared_data_are_told_apart_and_read_by_their_own_template(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    (ready / "manifest.json").touch()
    files = f"[x/train.jsonl,y/train.jsonl,{ready},z/*.parquet]"
    words = tiny("data.templates=[alpaca,raw,alpaca,alpaca]", f"data.train={files}", "data.on_bad_row=skip")
    (prepare,) = (stage for stage in stages(words) if stage.name == "prepare")
    lines = [shlex.split(line.replace("\\\n", " ")) for line in prepare.lines]
    assert [line[3] for line in lines] == ["x/train.jsonl", "y/train.jsonl", "z/*.parquet"]
    assert ["data.template=raw" in line for line in lines] == [False, True, False]
    assert all("data.on_bad_row=skip" in line and "data.fields.prompt=question" in line for line in lines)
    assert settings_of_ranks(launch(words)).data.train == (
        "/run/data/train",
        "/run/data/train~2",
        str(ready),
        "/run/data/all",
    )


def test_data_that_an_earlier_launch_prepared_are_this_run_s_or_refused(tmp_path: Path) -> None:
    mine, other, folder = tmp_path / "a" / "train.jsonl", tmp_path / "b" / "train.jsonl", tmp_path / "run"
    for file in (mine, other):
        file.parent.mkdir()
        file.write_text('{"instruction": "2 + 2", "response": "4"}\n')

    def prepared(file: Path, *words: str) -> bool:
        given = ["recipe=tiny_cpu", "objective=sft", f"data.train=[{file}]", *words]
        return is_prepared(compose(given, check_inputs=False), folder)

    def refused(file: Path, *words: str) -> str:
        with pytest.raises(UserError) as caught:
            prepared(file, *words)
        return str(caught.value)

    assert not prepared(mine)
    data = DataConfig(train=(str(mine),))
    model = project_dir() / "assets" / "tiny-base"
    prepare_files(
        [mine],
        data,
        tokenizer_dir=model,
        out=folder / "data" / "train",
        workers=1,
        suites=None,
        progress=lambda *_: None,
    )
    assert prepared(mine)
    assert f"data/train was prepared from {mine}, and the run reads {other}: add prepare" in refused(other)
    assert "prepared with data.template=alpaca, and the run has data.template=raw" in refused(
        mine, "data.template=raw"
    )
    assert "data.fields.prompt=null, and the run has data.fields.prompt=instruction" in refused(
        mine, "data.fields.prompt=instruction", "data.fields.response=response"
    )
    with mine.open("a") as text:
        text.write('{"instruction": "2 + 3", "response": "5"}\n')
    assert f"was prepared from {mine} before it changed: add prepare to --stages" in refused(mine)


@pytest.mark.parametrize(
    "value",
    [
        "plain/path.jsonl",
        "with space",
        "it's",
        "a,b]",
        "1e3",
        "true",
        "",
        "ü=$x",
        None,
        True,
        3,
        ["a b", "c"],
    ],
)
def test_a_setting_comes_back_as_it_was(value: object) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(setting("run.dir", value)).value() == value
