"""docs/llama_factory.md: our side of every pair composes and has the values of their file, and every setting that the page names exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from levels import remember_levels

from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig, data_parallel_size, walk

PAGE = Path(__file__).resolve().parents[2] / "docs" / "llama_factory.md"
__all__ = ["remember_levels"]  # a fixture

_PAIR = re.compile(
    r"^```yaml\n(.*?)^```\n\n<!-- .*? -->\n^```bash\n(.*?)^```", flags=re.DOTALL | re.MULTILINE
)

pytestmark = [
    pytest.mark.skipif(not PAGE.is_file(), reason="no docs here: not a clone"),
    pytest.mark.usefixtures("remember_levels"),
]


@dataclass(frozen=True)
class Pair:
    """One file of theirs and the run that the command of ours below it asks for."""

    theirs: dict[str, Any]
    settings: tuple[str, ...]

    @property
    def run(self) -> RunConfig:
        return compose(list(self.settings), check_inputs=False)


def pairs() -> list[Pair]:
    if not PAGE.is_file():
        return []
    found = _PAIR.findall(PAGE.read_text())
    return [
        Pair(yaml.safe_load(file), tuple(shlex.split(command.replace("\\\n", " "))[2:]))
        for file, command in found
    ]


def table() -> dict[str, str]:
    """Key of theirs -> the cell beside it."""
    found: dict[str, str] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            found.update((key.strip("` "), cells[1]) for key in cells[0].split(","))
    return found


def _objective(name: str) -> Callable[[RunConfig, Any, dict[str, Any]], None]:
    def check(run: RunConfig, value: Any, _: dict[str, Any]) -> None:
        assert value is True
        assert run.objective.name == name

    return check


def _peft(run: RunConfig, value: Any, _: dict[str, Any]) -> None:
    assert run.peft.name == {"full": "none", "lora": "lora"}[value]
    if run.objective.name == "asft":
        assert run.reference.form == {"full": "resident", "lora": "adapter_disabled"}[value]


def _rows(run: RunConfig, value: Any, _: dict[str, Any]) -> None:
    assert [Path(file).stem for file in run.data.train] == value.split(",")


def _template(run: RunConfig, value: Any, _: dict[str, Any]) -> None:
    assert run.data.template == (value if value == "alpaca" else "chat")
    assert run.data.template == "alpaca" or run.data.loss_on == "all_assistant"


def _product(run: RunConfig, value: Any, theirs: dict[str, Any]) -> None:
    rows = theirs["per_device_train_batch_size"] * value
    assert run.trainer.global_batch_size == rows * data_parallel_size(run) * run.parallel.tp_size
    assert run.parallel.pp_size * run.parallel.cp_size == 1


def _cut(run: RunConfig, value: Any, _: dict[str, Any]) -> None:
    assert run.data.sequence_length == value
    assert run.data.on_too_long == "truncate"


def _said(run: RunConfig, value: Any, _: dict[str, Any]) -> None:
    """What every file here says, and has no setting or none that is equal."""
    assert value in ("sft", "examples/deepspeed/ds_z3_config.json")


def _all_layers(run: RunConfig, value: Any, _: dict[str, Any]) -> None:
    assert value == "all"
    assert len(run.peft.targets) == 4


def _bf16(run: RunConfig, value: Any, _: dict[str, Any]) -> None:
    assert value is True
    assert run.precision == "bf16"


SPECIAL = {
    "use_dft_loss": _objective("dft"),
    "use_asft_loss": _objective("asft"),
    "use_eaft_loss": _objective("eaft"),
    "finetuning_type": _peft,
    "dataset": _rows,
    "template": _template,
    "gradient_accumulation_steps": _product,
    "cutoff_len": _cut,
    "lora_target": _all_layers,
    "bf16": _bf16,
    "stage": _said,
    "deepspeed": _said,
}


def test_there_are_pairs() -> None:
    assert [pair.run.objective.name for pair in pairs()] == ["dft", "asft", "asft", "eaft"]
    assert PAGE.read_text().count("```yaml") == PAGE.read_text().count("```bash") == len(pairs())


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: pair.theirs["output_dir"])
def test_our_side_has_their_values(pair: Pair) -> None:
    run, known = pair.run, table()
    values = dict(walk(run))
    for key, value in pair.theirs.items():
        assert key in known, f"{key}: no row says what it is here"
        if key in SPECIAL:
            SPECIAL[key](run, value, pair.theirs)
        else:
            ours = values[known[key].strip("`")]
            assert ours == value, f"{key}: {value} is {known[key]} {ours} here"


def test_every_setting_in_the_table_exists() -> None:
    settings = {key for key, _ in walk(compose(["recipe=tiny_cpu", "objective=sft"], check_inputs=False))}
    for key, cell in table().items():
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_*]+)?)`", cell):
            section = name.removesuffix("*")
            assert name in settings or any(one.startswith(section) for one in settings), f"{key}: no {name}"
    said = re.findall(r"`([a-z]+(?:\.[a-z_]+)=[a-z_]+)`", PAGE.read_text())
    assert {one.partition("=")[0] for one in said} <= settings
