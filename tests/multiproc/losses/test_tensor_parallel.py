"""The losses over 2 and 4 gloo ranks equal the definition in fp64. Ranks are started once for all cases."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiproc
RANKS = Path(__file__).with_name("tensor_parallel_ranks.py")
WORLD_SIZE = 4
TIME_OUT_SECONDS = 300
TOLERANCE = 1e-12
MEGATRON = "Megatron's cross entropy"


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    """Case -> figures of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    logs = [folder / f"log.{rank}" for rank in range(WORLD_SIZE)]
    processes = []
    try:
        for rank in range(WORLD_SIZE):
            arguments = [
                sys.executable,
                str(RANKS),
                str(rank),
                str(folder / "rendezvous"),
                str(folder / "results"),
            ]
            with logs[rank].open("w") as log:
                processes.append(subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + TIME_OUT_SECONDS
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() not in (None, 0) for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * WORLD_SIZE, "\n".join(
        f"rank {i} exited {code}: {logs[i].read_text()[-2000:]}" for i, code in enumerate(codes)
    )
    per_rank = [json.loads((folder / f"results.{rank}").read_text()) for rank in range(WORLD_SIZE)]
    return {case: [figures[case] for figures in per_rank if case in figures] for case in per_rank[0]}


def case_names() -> list[str]:
    sys.path.insert(0, str(RANKS.parent))
    import tensor_parallel_ranks

    return [f"TP{tp_size}/{name}" for tp_size in (2, 4) for name in tensor_parallel_ranks.cases()]


@pytest.mark.parametrize("case", case_names())
def test_equals_the_definition_on_every_rank(case, findings):
    for rank, figures in enumerate(findings[case]):
        beyond = {name: value for name, value in figures.items() if not value <= TOLERANCE}
        assert not beyond, f"rank {rank}: {beyond}"


def test_sft_is_megatrons_cross_entropy(findings):
    """Megatron computes in fp32 whatever it is given, so the two agree as well as its fp32 allows."""
    assert len(findings[MEGATRON]) == 2
    for figures in findings[MEGATRON]:
        assert figures["loss"] <= 1e-6
        assert figures["dLogits"] <= 1e-6


def test_every_case_ran(findings):
    assert sorted(findings) == sorted([*case_names(), MEGATRON])
    assert all(len(findings[case]) == WORLD_SIZE for case in case_names())
