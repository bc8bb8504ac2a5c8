"""Every script of a launch as it is kept in tests/golden/launch, and shellcheck's opinion of it.

After a wanted change: ASFT_WRITE_GOLDEN=1 pytest tests/unit/launching, and read the difference.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.paths import project_dir
from asft_nemo.launching.jobs import Place, render
from asft_nemo.launching.stages import Launch, build, choose

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
        *("cluster.container_mounts=[/models:/models]", 'cluster.env=["NCCL_DEBUG=WARN"]', 'cluster.sbatch_args=["mail-type=END"]'),
    ],
}  # fmt: skip

# What shellcheck says of NeMo-Run's own lines around ours: unquoted expansions and unused variables of its template.
OF_NEMO_RUN = "SC2034,SC2046,SC2086,SC2128,SC2206,SC2207"


def drawn(words: Sequence[str], folder: Path, start: Path) -> dict[str, str]:
    """File name -> text of every script, without what differs between machines."""
    run = compose(words, check_inputs=False, launched=True)
    names, _ = choose(run, None)
    target = (start / run.run.dir) if run.run.dir == "run" else Path(run.run.dir)
    asft = ("asft",) if run.cluster.container_image else (sys.executable, "-m", "asft_nemo")
    launch = Launch(run=run, words=tuple(words), asft=asft, folder=target, prepared=True)
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


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_the_golden_ones(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = GOLDEN / case
    found = drawn(CASES[case], tmp_path / "home", tmp_path)
    if os.environ.get("ASFT_WRITE_GOLDEN"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in found.items():
            (folder / name).write_text(text)
    assert {path.name: path.read_text() for path in folder.iterdir()} == found


@pytest.mark.parametrize(
    "path", sorted(GOLDEN.rglob("*.sh")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_script_is_clean_for_shellcheck(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    exclude = [f"--exclude={OF_NEMO_RUN}"] if path.name.endswith("_sbatch.sh") else []
    done = subprocess.run(["shellcheck", *exclude, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_sandbox_is_clean_for_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    tool = Path(__file__).resolve().parents[3] / "tools" / "slurm_sandbox"
    assert subprocess.run(["shellcheck", str(tool)], capture_output=True).returncode == 0
