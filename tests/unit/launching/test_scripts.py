"""Every script of four launches as tests/golden/launch keeps them, and shellcheck's opinion of all.

A golden file holds one launch. Batch scripts that are alike but for the stage's name are there once, with STAGE for it. A launch that is LIKE
another shows, script by script, what differs from it wherever that is shorter: so a changed line shows where it is written, and nowhere twice.

After a wanted change: ASFT_WRITE_GOLDEN=1 pytest tests/unit/launching/test_scripts.py, and read the difference.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.paths import project_dir
from asft_nemo.launching.jobs import Place, render
from asft_nemo.launching.stages import Launch, build, choose
from asft_nemo.launching.words import for_nodes

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "launch"

TINY = [
    *("experiment=tiny_gsm8k", "run.world_size=4", "parallel.tp_size=2", "run.dir=run"),
    *("data.train=[gsm8k/train.jsonl]", "eval.suites=[suite.jsonl]", "eval.limit=8"),
]
BIG = [
    *("experiment=medical_qwen25_72b", "model.path=/models/Qwen2.5-72B", "run.dir=/shared/runs/medical_72b"),
    *(
        "data.train=[/shared/data/medmcqa.jsonl]",
        "cluster.partition=gpu",
        "cluster.account=llm",
        "cluster.time=2-00:00:00",
    ),
]
CASES = {
    "sandbox": [*TINY, "cluster=slurm_sandbox", "reference=cached"],
    "local": TINY,
    "slurm_72b": [*BIG, "cluster=slurm", "cluster.exclusive=true", "cluster.cpus_per_task=12", "cluster.cpu_partition=cpu"],
    "pyxis_72b": [
        *(*BIG, "cluster=slurm_pyxis", "cluster.container_image=nvcr.io/nvidia/nemo:25.11", "cluster.mem='0'"),
        *("cluster.container_mounts=[/models:/models]", 'cluster.env=["NCCL_DEBUG=WARN"]', 'cluster.sbatch_args=["comment=two words"]'),
        'cluster.srun_args=[--no-container-mount-home,"--comment=two words"]',
    ],
}  # fmt: skip

LIKE = {"slurm_72b": "sandbox", "pyxis_72b": "slurm_72b"}

# What shellcheck says of NeMo-Run's own lines around ours: unquoted expansions and unused variables of its template.
OF_NEMO_RUN = "SC2034,SC2046,SC2086,SC2128,SC2206,SC2207"


def drawn(words: Sequence[str], folder: Path, start: Path) -> dict[str, str]:
    """File name -> text of every script, without what differs between machines."""
    run = for_nodes(compose(words, check_inputs=False, launched=True))
    names, _ = choose(run, None)
    target = (start / run.run.dir) if run.run.dir == "run" else Path(run.run.dir)
    asft = ("asft",) if run.cluster.container_image else (sys.executable, "-m", "asft_nemo")
    launch = Launch(run=run, asft=asft, folder=target, prepared=True)
    scripts = render(run, build(launch, names), Place(target, start, folder), experiment="asft_0")
    found = {f"{name}.sh": one.script for name, one in scripts.items()}
    found |= {f"{name}_sbatch.sh": one.batch for name, one in scripts.items() if one.batch is not None}
    machine = {
        str(folder): "/NEMO-RUN",
        str(start): "/START",
        sys.executable: "/PYTHON",  # before the project, in which it may be
        str(project_dir()): "/PROJECT",
    }
    for name, text in found.items():
        for here, word in machine.items():
            text = text.replace(here, word)
        found[name] = text
    return found


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, str]]:
    """Draws those of a case."""
    monkeypatch.setenv("NEMORUN_HOME", "")  # which NeMo-Run's callers set for good
    monkeypatch.chdir(tmp_path)
    return lambda case: drawn(CASES[case], tmp_path / "home", tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_the_golden_ones(case: str, scripts: Callable[[str], dict[str, str]]) -> None:
    found = written(scripts(case), scripts(LIKE[case]) if case in LIKE else {}, LIKE.get(case, ""))
    file = GOLDEN / f"{case}.txt"
    if os.environ.get("ASFT_WRITE_GOLDEN"):
        GOLDEN.mkdir(parents=True, exist_ok=True)
        file.write_text(found)
    assert file.read_text() == found


def written(found: dict[str, str], other: dict[str, str], name: str) -> str:
    """A golden file: scripts of a launch, or what differs from another's of that name."""
    first_of = {stage: text for stages, text in _kinds(other).items() for stage in stages}
    parts: list[str] = []
    for stages, text in _kinds(found).items():
        whole, like = text.splitlines(), first_of.get(stages[0], "").splitlines()
        changes = _changes(like, whole)
        title = f"===== {', '.join(stages)}"
        if like and len(changes) < len(whole):
            parts += [f"{title}: as in {name}, but for", *(changes or ["nothing"])]
        else:
            parts += [title, *whole]
    return "\n".join([*parts, ""])


def _changes(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """A diff whose places are lines and not numbers, which would change with every line above them."""
    found: list[str] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        if kind != "equal":
            found.append(f"@ behind: {before[start - 1] if start else 'the beginning'}")
            found += [f"-{line}" for line in before[start:end]]
            found += [f"+{line}" for line in after[new_start:new_end]]
    return found


def _kinds(scripts: dict[str, str]) -> dict[tuple[str, ...], str]:
    """Scripts, those that are alike but for the stage's name together."""
    names: dict[str, list[str]] = {}
    for name, text in scripts.items():
        stage = name.removesuffix(".sh").removesuffix("_sbatch")
        if name.endswith("_sbatch.sh"):
            text = re.sub(rf"(?<=[/.]){stage}(?=[/._:\n])|(?<=stage ){stage}(?= )", "STAGE", text)
        names.setdefault(text, []).append(name)
    return {tuple(alike): text for text, alike in names.items()}


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_clean_for_shellcheck(
    case: str, scripts: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = scripts(case)
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    for exclude, names in (
        ([f"--exclude={OF_NEMO_RUN}"], [name for name in found if name.endswith("_sbatch.sh")]),
        ([], [name for name in found if not name.endswith("_sbatch.sh")]),
    ):
        if names:
            done = subprocess.run(
                ["shellcheck", *exclude, *names], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout


def test_the_sandbox_is_clean_for_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    tool = Path(__file__).resolve().parents[3] / "tools" / "slurm_sandbox"
    assert subprocess.run(["shellcheck", str(tool)], capture_output=True).returncode == 0
