"""Levels, groups and messages of compose."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from asft_nemo.config.load import compose, known_options
from asft_nemo.config.paths import project_dir
from asft_nemo.config.schema import OptimConfig, RunConfig, from_dict, to_dict
from asft_nemo.errors import ConfigError

Configure = Callable[..., RunConfig]
Violations = Callable[..., tuple[str, ...]]


@pytest.fixture(autouse=True)
def remember_levels() -> None:
    """Nothing is remembered: Hydra's part is tested here."""


def test_the_first_command_of_the_readme_composes(configure: Configure) -> None:
    run = configure(
        "objective=asft",
        "reference=resident",
        "data.fields.prompt=question",
        "data.fields.response=answer",
        "parallel.tp_size=2",
        "parallel.pp_size=2",
    )
    assert (run.objective.name, run.objective.kl_weight, run.reference.form) == ("asft", 0.05, "resident")
    assert (run.precision, run.run.world_size, run.data.fields.prompt) == ("fp32", 4, "question")
    assert from_dict(to_dict(run)) == run


def test_recipe_beats_schema_and_command_line_beats_recipe(configure: Configure) -> None:
    assert OptimConfig().lr != configure("objective=sft").optim.lr == 5e-4
    assert configure("objective=sft", "optim.lr=1e-6").optim.lr == 1e-6


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A conf folder of our own, to look at the levels one by one."""
    files = {
        "config.yaml": "defaults:\n  - cluster: local\n  - _self_\n",
        "cluster/local.yaml": "name: local\n",
        "objective/asft.yaml": "name: asft\n",
        "objective/sft.yaml": "name: sft\n",
        "reference/resident.yaml": "form: resident\n",
        "reference/none.yaml": "form: none\n",
        "optim/slow.yaml": "lr: 1.0e-9\nweight_decay: 0.5\n",
        "optim/fast.yaml": "lr: 1.0e-3\n",
        "experiment/one.yaml": "# @package _global_\ndefaults:\n  - override /objective: asft\n  - override /optim: slow\n"
        "  - _self_\nrecipe: tiny_cpu\noptim:\n  lr: 1.0e-5\n",
        "experiment/two.yaml": "# @package _global_\ndefaults:\n  - one\n  - _self_\noptim:\n  eps: 1.0e-6\n",
        "experiment/misspelt.yaml": "# @package _global_\nrecipe: tiny_cpu\noptimizer:\n  lr: 1.0\n",
        "experiment/broken.yaml": "# @package _global_\ndefaults:\n  - override /objective: nope\nrecipe: tiny_cpu\n",
        "experiment/asks.yaml": "# @package _global_\ndefaults:\n  - override /objective: asft\n"
        "  - override /reference: resident\nrecipe: tiny_cpu\n",
        "experiment/epochs.yaml": "# @package _global_\nrecipe: tiny_cpu\ntrainer:\n  epochs: 3\n",
    }
    for name, text in files.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "conf"


def level_test(conf: Path, *overrides: str) -> RunConfig:
    return compose(["model.path=nowhere", *overrides], conf_dir=conf, check_inputs=False)


def test_experiment_beats_recipe_and_its_body_its_groups(conf: Path) -> None:
    run = level_test(conf, "experiment=one")
    assert (run.experiment, run.recipe, run.objective.name) == ("one", "tiny_cpu", "asft")
    assert (run.optim.lr, run.optim.weight_decay) == (1e-5, 0.5)


def test_a_group_on_the_command_line_beats_the_experiments_body(conf: Path) -> None:
    run = level_test(conf, "experiment=one", "optim=fast")
    assert (run.optim.lr, run.optim.weight_decay) == (1e-3, 0.5)
    assert level_test(conf, "optim=fast", "experiment=one", "optim.lr=2").optim.lr == 2.0


def test_an_experiment_may_extend_another(conf: Path) -> None:
    run = level_test(conf, "experiment=two")
    assert (run.experiment, run.optim.lr, run.optim.eps, run.objective.name) == ("two", 1e-5, 1e-6, "asft")


def test_mistakes_in_an_experiment_are_named(conf: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr is not a setting: did you mean optim\.lr"):
        level_test(conf, "experiment=misspelt", "objective=sft")
    with pytest.raises(ConfigError, match=r"experiment=broken cannot be composed .*nope"):
        level_test(conf, "experiment=broken")


def test_the_later_of_steps_and_epochs_speaks(conf: Path) -> None:
    assert level_test(conf, "recipe=tiny_cpu", "objective=sft").trainer.max_steps == 50
    assert level_test(conf, "experiment=epochs", "objective=sft").trainer.max_steps is None
    assert (
        level_test(conf, "experiment=epochs", "objective=sft", "trainer.max_steps=2").trainer.max_steps == 2
    )


def test_a_recipes_reference_counts_as_none_where_nothing_reads_it(conf: Path) -> None:
    assert level_test(conf, "experiment=one").reference.form == "resident"
    assert level_test(conf, "experiment=one", "objective=sft").reference.form == "none"
    assert level_test(conf, "experiment=one", "objective.kl_weight=0").reference.form == "none"


def test_a_reference_asked_for_that_nothing_reads_is_an_error(conf: Path) -> None:
    for overrides in (
        ("experiment=asks", "objective=sft"),
        ("experiment=one", "objective=sft", "reference=resident"),
    ):
        with pytest.raises(ConfigError, match="objective=sft reads none: set reference=none"):
            level_test(conf, *overrides)
    with pytest.raises(ConfigError, match="objective=asft with kl_weight=0 reads none"):
        level_test(conf, "experiment=asks", "objective.kl_weight=0")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective=asfy", "unknown objective 'asfy': did you mean 'asft'?"),
        ("reference=residnet", "unknown reference 'residnet': did you mean 'resident'?"),
        ("experiment=nowhere_near", "unknown experiment 'nowhere_near': known are"),
        (
            "experiment=medical_qwen25_27b",
            "unknown experiment 'medical_qwen25_27b': did you mean 'medical_qwen25_7b' or 'medical_qwen25_72b'",
        ),
        ("experment=tiny", "experment is not a setting: did you mean experiment?"),
        ("clusters=slurm", "clusters is not a setting: did you mean cluster?"),
        ("recipe=tiny_gpu", "unknown recipe 'tiny_gpu': did you mean 'tiny_cpu'?"),
        ("optim.lrr=1", "optim.lrr is not a setting: did you mean optim.lr?"),
        ("lr=1", "lr is not a setting: did you mean optim.lr?"),
        ("kl_weight=1", "kl_weight is not a setting: did you mean objective.kl_weight?"),
        ("data.zzzz=1", "data.zzzz is not a setting: known are data.train"),
        ("parallel=2", "parallel is a section: set one of parallel.tp_size"),
        ("optim.lr=fast", "optim.lr='fast' is not a number"),
        ("optim.lr=null", "optim.lr=null is not a number"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5 is not a whole number or null"),
        ("data.train=a.jsonl", "data.train='a.jsonl' is not a list [...] of texts"),
        ("data.train=a,b", "'data.train=a,b' would be several runs: write a list as data.train=[...]"),
        ("+optim.lr=1", "cannot use '+optim.lr=1'"),
        ("~optim", "cannot use '~optim'"),
        ("data.train=[a", "cannot read 'data.train=[a'"),
        ("nonsense", "cannot read 'nonsense'"),
    ],
)
def test_mistakes_get_one_sentence_with_a_hint(violations: Violations, override: str, sentence: str) -> None:
    objective = () if override.startswith("objective") else ("objective=asft",)
    found = violations(*objective, override)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_mistakes_of_one_kind_come_together(violations: Violations) -> None:
    assert len(violations("objective=asft", "optim.lrr=1", "optim.lr=x", "run.sed=1")) == 3
    assert len(violations("objective=asfy", "+a=1", "b")) == 3


def test_objective_has_no_silent_default(violations: Violations) -> None:
    assert violations() == (
        "objective.name is not set: set objective=asft (or sft, dft, sft_kl); there is no silent default",
    )


def test_no_recipe_lists_the_recipes() -> None:
    with pytest.raises(ConfigError, match=r"no recipe is given.*tiny_cpu"):
        compose(["objective=asft"])


def test_lists_and_numbers_as_hydra_writes_them(configure: Configure, data_file: Path) -> None:
    run = configure(
        "objective=asft",
        f"data.train=[{data_file},{data_file}]",
        "optim.lr=3e-5",
        "loss.normalize_by=micro_batch",
    )
    assert run.data.train == (str(data_file), str(data_file))
    assert run.optim.lr == 3e-5


def test_hydras_global_state_is_left_as_it_was(configure: Configure) -> None:
    assert GlobalHydra.instance().hydra is None
    configure("objective=asft")
    assert GlobalHydra.instance().hydra is None


def test_every_group_file_composes() -> None:
    for path in (project_dir() / "conf").iterdir():
        if path.is_dir():
            assert known_options(path.name), f"conf/{path.name} is empty"


def test_composing_imports_neither_torch_nor_nemo() -> None:
    code = (
        "import sys; from asft_nemo.config.load import compose;"
        "compose(['recipe=tiny_cpu', 'objective=asft'], check_inputs=False);"
        "print([name for name in ('torch', 'nemo', 'nemo_run', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
