"""Files in conf/ hold no default of the schema; test_experiments.py has the experiments."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from asft_nemo.config.load import compose
from asft_nemo.config.paths import project_dir
from asft_nemo.config.schema import RunConfig, walk

CONF = project_dir() / "conf"
# The paper's settings stand between schema and recipe on one side and the command line on the other, so they are stated whole.
WHOLE = ("conf", "experiment", "paper")
GROUP_FILES = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name not in WHOLE)
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


def test_what_the_cluster_file_offers_in_comments_composes(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    offered = re.sub(
        r"^# (?=[a-z_]+: )", "", (CONF / "cluster" / "slurm_pyxis.yaml").read_text(), flags=re.MULTILINE
    )
    (conf / "cluster" / "ours.yaml").write_text(offered)
    words = ["experiment=medical_qwen25_72b", "model.path=nowhere", "cluster=ours"]
    cluster = compose(words, conf_dir=conf, check_inputs=False, launched=True).cluster
    assert (cluster.mem, cluster.gpus_per_node, cluster.request_gpus) == ("0", 4, False)
    assert cluster.sbatch_args == ("wait-all-nodes=1", "mail-type=END")
