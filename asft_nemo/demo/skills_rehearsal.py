"""The demo's comparison in one process: plain transformers, the dense loss, AdamW. For choosing the demo's settings.

    python -m asft_nemo.demo.skills_rehearsal --lr 5e-4 --kl-weight 0.05 --seeds 0 1 2 --out runs/rehearsal

It shares data, loss definition and evaluation with the demo and nothing with Megatron, so it is also a second opinion on
the demo's figures. Every figure goes to `rehearsal.jsonl` in the output folder, one line an objective and seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from asft_eval.backends import Options
from asft_eval.backends.hf import encode_pair, load_model, load_tokenizer, right_padded
from asft_eval.kl import measure_drift
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs

from asft_nemo.demo import skills
from asft_nemo.losses import dense_loss
from asft_nemo.objectives import OBJECTIVES, Objective, objective

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 12  # the longest right answer has six tokens and an end


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One fine-tuning run; fp32, AdamW without decay, gradient norm clipped at 1, linear warm-up, cosine to zero."""

    lr: float
    kl_weight: float
    steps: int
    global_batch_size: int
    examples: int
    wrong_share: float
    seed: int
    warmup_ratio: float = 0.1


def fine_tune(base: Any, tokenizer: Any, chosen: Objective, settings: Settings) -> Any:
    """A fine-tuned copy of `base`; the mean is over all response tokens of the global batch."""
    data = skills.new_skill_train(settings.examples, settings.seed, wrong_share=settings.wrong_share)
    encoded = [encode_pair(tokenizer, s.prompt, s.response, end=True) for s in data]
    rng = random.Random(settings.seed)
    policy = copy.deepcopy(base).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    warmup = settings.warmup_ratio * settings.steps

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (settings.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    order: list[int] = []
    for _ in range(settings.steps):
        if len(order) < settings.global_batch_size:
            order = rng.sample(range(len(encoded)), len(encoded))
        batch = [encoded[order.pop()] for _ in range(settings.global_batch_size)]
        tokens_BS, attention_BS, labels_BS, mask_BS = right_padded(
            batch, pad_id=tokenizer.pad_token_id, device="cpu"
        )
        call = {"input_ids": tokens_BS, "attention_mask": attention_BS, "use_cache": False}
        ref_logits_TV = None
        if chosen.divergence is not None:
            with torch.no_grad():
                ref_logits_TV = base(**call).logits.flatten(0, 1)
        out = dense_loss(
            policy(**call).logits.flatten(0, 1),
            labels_BS.flatten(),
            mask_BS.flatten(),
            objective=chosen,
            ref_logits_TV=ref_logits_TV,
        )
        optimizer.zero_grad()
        (out.loss_sum / out.num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return policy.eval()


def measure(model_dir: Path, base_dir: Path, *, tests: int, out_dir: Path) -> dict[str, Any]:
    """Accuracy on the new and each old skill and the drift from the base on held-out text."""
    suites = [suite_from_pairs(skills.NEW_SKILL, skills.new_skill_test(2 * tests, 0))]
    suites += [suite_from_pairs(name, samples) for name, samples in skills.old_skill_tests(tests, 0).items()]
    result = evaluate(
        model_dir,
        suites,
        backend="hf",
        out_dir=out_dir,
        max_tokens=MAX_NEW_TOKENS,
        options=Options(batch_size=256),
    )
    accuracy = {name: figures.accuracy for name, figures in result.suites.items()}
    old = [accuracy[name] for name in skills.OLD_SKILLS]
    drift = measure_drift(model_dir, base_dir, skills.held_out_text(320, 0), batch_size=64)
    return {
        "new": accuracy[skills.NEW_SKILL],
        "old": sum(old) / len(old),
        "forward_kl": drift.forward_kl,
        "reverse_kl": drift.reverse_kl,
        "accuracy": accuracy,
    }


def rehearse(
    base_dir: Path, names: Sequence[str], all_settings: Sequence[Settings], *, tests: int, out_dir: Path
):
    """Fine-tune and measure every objective with every setting; yields one record each, the untouched base first."""
    yield {"objective": "base", **measure(base_dir, base_dir, tests=tests, out_dir=out_dir / "base")}
    tokenizer, base = load_tokenizer(base_dir), load_model(base_dir, dtype=torch.float32, device="cpu")
    for settings in all_settings:
        for name in names:
            anchored = OBJECTIVES[name].direction is not None
            chosen = objective(name, kl_weight=settings.kl_weight) if anchored else objective(name)
            started = time.perf_counter()
            policy = fine_tune(base, tokenizer, chosen, settings)
            seconds = time.perf_counter() - started
            model_dir = out_dir / f"{name}_seed{settings.seed}"
            policy.save_pretrained(model_dir)
            tokenizer.save_pretrained(model_dir)
            figures = measure(model_dir, base_dir, tests=tests, out_dir=model_dir / "evaluation")
            yield {"objective": name, **asdict(settings), "seconds": round(seconds, 1), **figures}


def main() -> None:
    """Run the rehearsal from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("asft_eval").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("assets/tiny-base"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--objectives", nargs="+", default=["sft", "dft", "sft_kl", "asft"])
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--kl-weight", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--global-batch-size", type=int, default=32)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--wrong-share", type=float, default=skills.WRONG_SHARE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--tests", type=int, default=100, help="examples of each old skill; the new one has twice"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    all_settings = [
        Settings(
            lr=arguments.lr,
            kl_weight=arguments.kl_weight,
            steps=arguments.steps,
            global_batch_size=arguments.global_batch_size,
            examples=arguments.examples,
            wrong_share=arguments.wrong_share,
            seed=seed,
        )
        for seed in arguments.seeds
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = rehearse(
        arguments.base, arguments.objectives, all_settings, tests=arguments.tests, out_dir=arguments.out
    )
    with (arguments.out / "rehearsal.jsonl").open("a") as lines:
        for record in records:
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            shown = {k: record[k] for k in ("new", "old", "forward_kl", "reverse_kl")}
            where = f"{record['objective']:7s} seed {record.get('seed', '-')}"
            log.info("%s  %s", where, "  ".join(f"{k} {v:.3f}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
