"""Make `assets/tiny-base`: a Qwen2 checkpoint of 2.6 million parameters that has the small skills of `asft_nemo.demo.skills`.

    python tools/make_tiny_base.py --out assets/tiny-base

Trains a byte-level BPE tokenizer of exactly 512 entries and then the model, from a seed, on one core; measures every skill
on prompts that training cannot draw, and writes weights, tokenizer and a README with what was measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from asft_nemo.demo import skills

log = logging.getLogger("make_tiny_base")

VOCABULARY_SIZE = 512
END, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one pre-training run."""

    seed: int = 0
    steps: int = 2400
    rows: int = 48  # sequences a step
    row_tokens: int = 96
    muon_lr: float = 0.02  # for the matrices of the layers
    adam_lr: float = 3e-3  # for everything else
    warmup_steps: int = 50
    threads: int = 1


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE; capitals and digits always stay tokens of their own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex("[A-Z0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END, PAD, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = (s.prompt + s.response for s in islice(skills.pretraining_samples(seed), 50_000))
    core.train_from_iterator(corpus, trainer)
    spare = VOCABULARY_SIZE - core.get_vocab_size()
    core.add_special_tokens([f"<|spare_{i}|>" for i in range(spare)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of four layers in fp32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_sliding_window=False,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, samples: list[skills.Sample]) -> list[tuple[list[int], int]]:
    """Token ids of `prompt + response + end`, and how many of them are the prompt's."""
    prompts = tokenizer([s.prompt for s in samples], add_special_tokens=False)["input_ids"]
    responses = tokenizer([s.response for s in samples], add_special_tokens=False)["input_ids"]
    return [(p + r + [tokenizer.eos_token_id], len(p)) for p, r in zip(prompts, responses, strict=True)]


def rows_of_text(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless `(tokens, labels)`, each int64 [rows, row_tokens], already shifted; examples fill a row until one does not fit.

    Only response and end tokens have a label: the letters of a prompt are random and teach nothing.
    """
    samples = skills.pretraining_samples(recipe.seed)
    waiting: list[tuple[list[int], int]] = []
    while True:
        tokens = torch.full((recipe.rows, recipe.row_tokens + 1), tokenizer.pad_token_id)
        labels = torch.full((recipe.rows, recipe.row_tokens + 1), IGNORED)
        for row in range(recipe.rows):
            start = 0
            while True:
                if not waiting:
                    waiting = encode(tokenizer, list(islice(samples, 1024)))[::-1]
                ids, prompt_length = waiting[-1]
                if start + len(ids) > recipe.row_tokens + 1:
                    break
                waiting.pop()
                tokens[row, start : start + len(ids)] = torch.tensor(ids)
                labels[row, start + prompt_length : start + len(ids)] = torch.tensor(ids[prompt_length:])
                start += len(ids)
        yield tokens[:, :-1], labels[:, 1:]


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> int:
    """Train in place (bf16 arithmetic on fp32 weights); returns the number of tokens seen."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate_share(step, recipe))
        for o in optimizers
    ]
    model.train()
    started, seen = time.perf_counter(), 0
    for step, (tokens, labels) in enumerate(islice(rows_of_text(tokenizer, recipe), recipe.steps)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seen += tokens.numel()
        if step % 50 == 0 or step == recipe.steps - 1:
            seconds = time.perf_counter() - started
            log.info("step %d loss %.4f tokens %d seconds %.0f", step, loss.item(), seen, seconds)
    return seen


@torch.inference_mode()
def accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: list[skills.Sample]
) -> float:
    """Share of samples whose greedy completion equals the response exactly."""
    model.eval()
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, len(samples), 128):
        part = samples[start : start + 128]
        batch = tokenizer(
            [s.prompt for s in part], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        out = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        right += sum(text == s.response for text, s in zip(texts, part, strict=True))
    return right / len(samples)


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int) -> dict[str, float]:
    """Accuracy on `n` unseen prompts of each skill (all facts), by name."""
    tests = {skills.NEW_SKILL: skills.new_skill_test(n, 0), **skills.old_skill_tests(n, 0)}
    return {name: accuracy(model, tokenizer, samples) for name, samples in tests.items()}


def main() -> None:
    """Make the asset."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--muon-lr", type=float, default=Recipe.muon_lr)
    parser.add_argument("--adam-lr", type=float, default=Recipe.adam_lr)
    arguments = parser.parse_args()
    recipe = Recipe(
        steps=arguments.steps, seed=arguments.seed, muon_lr=arguments.muon_lr, adam_lr=arguments.adam_lr
    )
    torch.set_num_threads(recipe.threads)
    started = time.perf_counter()
    tokenizer = make_tokenizer(recipe.seed)
    model = make_model(tokenizer, recipe.seed)
    tokens = pretrain(model, tokenizer, recipe)
    seconds = time.perf_counter() - started
    model = model.to(torch.bfloat16)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out, safe_serialization=True)
    tokenizer.save_pretrained(arguments.out)
    scores = measure(model.float(), tokenizer, 500)
    log.info(
        json.dumps(
            {"recipe": asdict(recipe), "tokens": tokens, "seconds": round(seconds), "accuracy": scores}
        )
    )


if __name__ == "__main__":
    main()
