"""Files in conf/ hold no default of the schema, and every experiment composes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from asft_nemo.config.load import compose, known_options
from asft_nemo.config.paths import project_dir
from asft_nemo.config.schema import RunConfig, walk

CONF = project_dir() / "conf"
GROUP_FILES = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name not in ("conf", "experiment"))
DEFAULTS = dict(walk(RunConfig()))


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_group_file_says_only_what_differs_from_the_schema(path: Path) -> None:
    values = leaves(OmegaConf.to_container(OmegaConf.load(path)), f"{path.parent.name}.")
    assert values, "an empty group file does nothing"
    for key, value in values.items():
        assert key in DEFAULTS
        assert value != DEFAULTS[key], f"{key}={value} is the schema's default"


def test_config_yaml_chooses_nothing_that_a_recipe_sets() -> None:
    assert OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml")) == {
        "defaults": [{"cluster": "local"}, "_self_"]
    }


@pytest.mark.parametrize("name", known_options("experiment"))
def test_experiment_composes(name: str, tmp_path: Path) -> None:
    run = compose([f"experiment={name}", f"model.path={tmp_path}"], check_inputs=False)
    assert run.experiment == name
    assert run.objective.name == "asft"
    assert run.reference.form == ("adapter_disabled" if run.peft.name == "lora" else "resident")


@pytest.mark.parametrize("name", [name for name in known_options("experiment") if name.endswith("_kl003")])
def test_kl003_variant_differs_only_in_kl_weight(name: str, tmp_path: Path) -> None:
    settings = [f"model.path={tmp_path}", "run.dir=x"]
    variant = dict(walk(compose([f"experiment={name}", *settings], check_inputs=False)))
    base = dict(walk(compose([f"experiment={name.removesuffix('_kl003')}", *settings], check_inputs=False)))
    assert {key for key in base if base[key] != variant[key]} == {"experiment", "objective.kl_weight"}
    assert (base["objective.kl_weight"], variant["objective.kl_weight"]) == (0.05, 0.03)
