"""An exported model goes on under TRL's GRPO, rewarded by the mathematics grader: `make test-rl`."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

trl = pytest.importorskip("trl", reason="TRL is not installed here: make test-rl has it")

import torch  # noqa: E402
from asft_eval.rewards import math_reward  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

STEPS = 3
SUMS = [(a, b) for a in range(2, 50, 3) for b in range(3, 50, 4)]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    """What `asft export` wrote."""
    return Path(os.environ["ASFT_RL_MODEL"])


@pytest.fixture(scope="module")
def trainer(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> trl.GRPOTrainer:
    """After a few steps on sums that the model gets right now and then."""
    rows = [{"prompt": f"add {a}+{b}:", "answer": str(a + b)} for a, b in SUMS]
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("grpo")),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=8,
        learning_rate=1e-4,
        beta=0.04,  # the anchor: KL to the model that the run began with
        use_cpu=True,
        bf16=False,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    found = trl.GRPOTrainer(
        model=str(model_dir), reward_funcs=math_reward, args=settings, train_dataset=Dataset.from_list(rows)
    )
    found.train()
    return found


def test_every_step_has_a_finite_loss(trainer: trl.GRPOTrainer) -> None:
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert len(steps) == STEPS
    for line in steps:
        assert all(math.isfinite(line[name]) for name in ("loss", "grad_norm", "kl", "reward")), line


def test_the_grader_tells_right_from_wrong(trainer: trl.GRPOTrainer) -> None:
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert 0 < sum(rewards) < STEPS, "all completions got the same reward: nothing was learned from"


def test_weights_moved_and_stayed_finite(trainer: trl.GRPOTrainer, model_dir: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).state_dict()
    moved = 0
    for name, weight in trainer.model.state_dict().items():
        assert torch.isfinite(weight).all(), name
        moved += int(not torch.equal(weight.float(), before[name]))
    assert moved > len(before) / 2


def test_what_it_saves_is_a_model_that_asft_eval_reads(trainer: trl.GRPOTrainer, tmp_path: Path) -> None:
    from asft_eval.backends.hf import HfBackend
    from asft_eval.protocols import protocols

    trainer.save_model(str(tmp_path / "model"))
    (how,) = protocols("greedy", max_tokens=8)
    answers = HfBackend(tmp_path / "model", batch_size=2).generate(["add 33+7:", "add 2+3:"], protocol=how)
    assert all(answer.num_tokens > 0 for answer in answers)


def test_the_reward_reads_text_and_conversations() -> None:
    right, wrong = "It is \\boxed{40}.", [{"role": "assistant", "content": "41"}]
    assert math_reward([right, wrong, ""], ["40", "40", "40"], prompts=None) == [1.0, 0.0, 0.0]
