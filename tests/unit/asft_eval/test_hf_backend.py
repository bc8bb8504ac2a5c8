"""The hf backend against transformers' own, unbatched answers; drift between two checkpoints against a plain computation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from asft_eval import EvaluationError, Protocol
from asft_eval.backends.drawing import SeededDraw
from asft_eval.backends.hf import HfBackend, load_model
from asft_eval.backends.tokens import encode_pair, end_tokens
from asft_eval.kl import kl_sums, measure_drift
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["copy KTAB:", "reverse QWERTZ:", "add 3+4:", "story: the cat sees a hat."]
TEXTS = [
    ("copy KTAB:", "KTAB"),
    ("add 12+30:", "42"),
    ("reverse ABC:", "CBA"),
    ("story: a dog.", " the old cat"),
]


@pytest.fixture(scope="module")
def backend(model_dir: Path) -> HfBackend:
    return HfBackend(model_dir, batch_size=3)


def test_batched_generation_equals_one_by_one(model_dir: Path, backend: HfBackend):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    answers = backend.generate(PROMPTS, protocol=Protocol(max_tokens=10))
    for prompt, completion in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert completion.text == tokenizer.decode(out, skip_special_tokens=True)
        assert completion.finished == (tokenizer.eos_token_id in out.tolist())
        assert completion.num_tokens == len(out)


def test_a_rotary_embedding_in_both_spellings_is_one(model_dir: Path, tmp_path: Path):
    folder = tmp_path / "both"
    shutil.copytree(model_dir, folder)
    linear = {"rope_type": "linear", "factor": 2.0}
    changes = {"rope_theta": 5e5, "rope_scaling": linear, "rope_parameters": {"rope_theta": 5e5, **linear}}
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).config.rope_theta == 5e5


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_models_own_wishes_for_drawing_are_not_read(
    model_dir: Path, backend: HfBackend, tmp_path: Path, name: str
):
    wishes = tmp_path / "wishes"
    shutil.copytree(model_dir, wishes)
    if name == "config.json":
        (wishes / "generation_config.json").unlink(missing_ok=True)
    there = json.loads((wishes / name).read_text()) if (wishes / name).is_file() else {}
    asked = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "min_new_tokens": 12}
    (wishes / name).write_text(json.dumps({**there, **asked}))
    prompts = ["a b a b a b", "2 + 2 ="]
    for how in (
        Protocol(max_tokens=16),
        Protocol(name="paper", max_tokens=16, temperature=1.0, seed=0),
    ):
        seeds = [1, 2] if how.temperature else []
        expected = backend.generate(prompts, protocol=how, seeds=seeds)
        assert HfBackend(wishes, batch_size=2).generate(prompts, protocol=how, seeds=seeds) == expected


def test_the_end_of_a_turn_ends_a_completion(model_dir: Path, backend: HfBackend, tmp_path: Path):
    """A model that learned from its chat template: the end token and the template's change places in the head."""
    folder = tmp_path / "chat"
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    end, of_turn = backend.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    tensors["lm_head.weight"][[end, of_turn]] = tensors["lm_head.weight"][[of_turn, end]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    how = Protocol(max_tokens=40)
    expected = backend.generate(PROMPTS, protocol=how)
    assert all(one.finished for one in expected)
    turned = HfBackend(folder, batch_size=3)
    assert end_tokens(turned.tokenizer) == (end, of_turn)
    assert turned.generate(PROMPTS, protocol=how) == expected
    (folder / "chat_template.jinja").unlink()
    without = HfBackend(folder, batch_size=3)
    assert end_tokens(without.tokenizer) == (end,)
    assert without.generate(PROMPTS, protocol=how) != expected, "it goes on behind its answer"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}",
    ],
)
def test_templates_that_end_turns_with_no_token_of_their_own(model_dir: Path, template: str):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = template
    assert end_tokens(tokenizer) == (tokenizer.eos_token_id,)


def test_a_cut_completion_says_so(backend: HfBackend):
    (completion,) = backend.generate(["story: the cat sees a hat."], protocol=Protocol(max_tokens=2))
    assert not completion.finished
    assert completion.num_tokens == 2


def test_loglikelihood_equals_a_plain_computation(model_dir: Path, backend: HfBackend):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for (prompt, text), answer in zip(TEXTS, backend.loglikelihood(TEXTS), strict=True):
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt)["input_ids"]
        ids = ids + tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert answer.logprob == pytest.approx(expected, abs=1e-4)
        assert answer.num_tokens == len(ids) - start


@pytest.mark.parametrize("at_once", [1, 150, 2**25], ids=["a token", "some tokens", "all"])
@pytest.mark.parametrize("keeps", [True, False], ids=["places", "all logits"])
def test_only_scored_places_go_through_the_head(
    keeps: bool, at_once: int, backend: HfBackend, monkeypatch: pytest.MonkeyPatch
):
    """The same numbers to fp32 rounding, whether the family can leave logits out, and however few are in fp32 at once."""
    monkeypatch.setattr("asft_eval.backends.hf._LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(backend, "_keeps_logits", keeps)
    pairs = [*TEXTS, ("copy KTAB: and a long prompt before", "K"), ("nothing follows", "")]
    encoded = [encode_pair(backend.tokenizer, *pair, end=False) for pair in pairs]
    expected: list[float] = []
    with torch.inference_mode():
        for ids, start in encoded:
            logprobs_SV = backend.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected.append(sum(float(logprobs_SV[at - 1, ids[at]]) for at in range(start, len(ids))))
    places: list[int] = []
    head = backend.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: places.append(given[0].shape[1]))
    try:
        found = backend.loglikelihood(pairs)
    finally:
        hook.remove()
    assert [one.logprob for one in found] == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert [one.num_tokens for one in found] == [len(ids) - start for ids, start in encoded]
    batches = [[encoded[i] for i in batch] for batch in backend._batches([len(ids) for ids, _ in encoded])]
    scored = [len({at for ids, start in batch for at in range(start, len(ids))}) for batch in batches]
    whole = [max(len(ids) for ids, _ in batch) for batch in batches]
    assert places == (scored if keeps else whole)
    assert sum(scored) < sum(whole) / 2


def test_choices_of_one_token_are_a_distribution(backend: HfBackend):
    vocabulary = [chr(x) for x in range(ord("A"), ord("Z") + 1)]
    (logprobs,) = backend.choice_logprobs(["copy KTAB:"], vocabulary)
    assert 0.5 < sum(torch.tensor(logprobs).exp().tolist()) <= 1 + 1e-5


def test_a_draw_depends_on_its_seed_alone(backend: HfBackend):
    drawn = Protocol(name="paper", max_tokens=6, temperature=1.0, seed=0)
    seeds = [11, 12, 13, 14]
    together = backend.generate(PROMPTS, protocol=drawn, seeds=seeds)
    alone = [backend.generate([p], protocol=drawn, seeds=[x])[0] for p, x in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    several = backend.generate(PROMPTS[-1:] * 20, protocol=drawn, seeds=range(20))
    assert len({completion.text for completion in several}) > 5
    with pytest.raises(EvaluationError, match="one a prompt"):
        backend.generate(["a"], protocol=drawn)


def test_draws_follow_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4)
    expected = (scores[0] / 0.7).softmax(-1)
    draw = SeededDraw(range(20_000), temperature=0.7, top_p=1.0)
    counts = draw(torch.empty(0), scores).argmax(-1).bincount(minlength=4)
    chi_square = ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum()
    assert chi_square < 16.27  # 99.9 % point, 3 degrees of freedom
    nucleus = SeededDraw(range(200), temperature=1.0, top_p=0.8)(torch.empty(0), scores[:200])
    assert set(nucleus.argmax(-1).tolist()) == {0, 1}  # 0.64 + 0.24 of the probability


def test_choices_equal_the_scores_of_the_continuations(backend: HfBackend):
    choices = ["A", "Z", "story"]
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in choices]
    plain = [x.logprob for x in backend.loglikelihood(pairs)]
    found = backend.choice_logprobs(PROMPTS, choices)
    assert [x for row in found for x in row] == pytest.approx(plain, abs=1e-4)
    short = backend.choice_logprobs(PROMPTS, choices[:2])  # all of one token: read off one distribution
    assert [x for row in short for x in row] == pytest.approx([x for row in found for x in row[:2]], abs=1e-4)


def test_evaluate_loads_and_scores(model_dir: Path, tmp_path: Path):
    suite = suite_from_pairs("copy", [("copy KTAB:", "KTAB"), ("copy XYZ:", "nothing like it")])
    result = evaluate(model_dir, [suite], backend="hf", out_dir=tmp_path, max_tokens=8)
    assert result.suites["copy"].accuracy == 0.5
    assert set(result.versions) == {"python", "asft_eval", "torch", "transformers"}


def test_a_model_has_no_drift_from_itself(model_dir: Path):
    drift = measure_drift(model_dir, model_dir, TEXTS, batch_size=2)
    assert drift.forward_kl == 0
    assert drift.reverse_kl == 0
    assert drift.policy_nll == drift.ref_nll


def test_drift_equals_a_plain_computation_whatever_the_batch(model_dir: Path, moved_dir: Path):
    policy = AutoModelForCausalLM.from_pretrained(moved_dir, dtype=torch.float64)
    ref = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    forward, reverse, nll, count = 0.0, 0.0, 0.0, 0
    for prompt, response in TEXTS:
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        with torch.inference_mode():
            log_p = policy(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            log_q = ref(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        forward += torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="sum").item()
        reverse += torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        nll -= log_p.gather(-1, torch.tensor(ids[start:])[:, None]).sum().item()
        count += len(ids) - start
    for batch_size in (1, 3, 8):
        drift = measure_drift(moved_dir, model_dir, TEXTS, batch_size=batch_size)
        assert drift.num_tokens == count
        assert drift.num_texts == len(TEXTS)
        assert drift.forward_kl == pytest.approx(forward / count, rel=1e-3)
        assert drift.reverse_kl == pytest.approx(reverse / count, rel=1e-3)
        assert drift.policy_nll == pytest.approx(nll / count, rel=1e-4)
    assert forward != pytest.approx(reverse, rel=1e-2), "the two directions must be told apart"


def test_kl_directions_by_hand():
    policy, ref = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.75, 0.25]]).double().log()
    forward, reverse = kl_sums(policy, ref)
    assert forward.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert reverse.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("missing", "says"),
    [("config.json", "configuration"), ("model.safetensors", "weights"), ("tokenizer*", "tokenizer")],
)
def test_incomplete_model_directories(model_dir: Path, tmp_path: Path, missing: str, says: str):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    for file in folder.glob(missing):
        file.unlink()
    with pytest.raises(EvaluationError, match=says):
        HfBackend(folder, batch_size=1)


def test_no_text_and_no_directory(model_dir: Path, tmp_path: Path):
    with pytest.raises(EvaluationError, match="no text"):
        measure_drift(model_dir, model_dir, [], batch_size=1)
    with pytest.raises(EvaluationError, match="check the path"):
        HfBackend(tmp_path / "none", batch_size=1)
