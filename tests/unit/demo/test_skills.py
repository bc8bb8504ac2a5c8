"""The demo's small world: right answers, and training and tests that cannot meet."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from asft_nemo.demo import skills


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("copy", "KTABZ"),
        ("reverse", "ZBATK"),
        ("up", "ABKTZ"),
        ("down", "ZTKBA"),
        ("next", "LUBCA"),
        ("back", "ACBUL"),
        ("swap", "ZTABK"),
    ],
)
def test_rules_on_letters(name: str, answer: str):
    assert skills.RULES[name]("KTABZ") == answer


def test_answers_fit_their_prompts():
    for sample in skills.old_skill_tests(50, 1)["add"]:
        left, right = sample.prompt.removeprefix("add ").removesuffix(":").split("+")
        assert int(sample.response) == int(left) + int(right)
    for sample in skills.new_skill_test(50, 1):
        name, letters = sample.prompt.removesuffix(":").split()
        assert sample.response == skills.RULES[name](letters)


def test_training_and_tests_cannot_meet():
    trained = {s.prompt for s in islice(skills.pretraining_samples(0), 30_000)}
    trained |= {s.prompt for s in skills.new_skill_train(2_000, 0)}
    tested = {s.prompt for seed in (0, 1) for s in skills.new_skill_test(300, seed)}
    for name, samples in skills.old_skill_tests(300, 0).items():
        if name != "fact":
            tested |= {s.prompt for s in samples}
    assert not trained & tested
    assert not any(skills.is_test_prompt(p) for p in trained if not p.startswith("capital of"))
    assert all(map(skills.is_test_prompt, tested))


def test_facts_are_recalled_not_inferred():
    facts = skills.old_skill_tests(100, 0)["fact"]
    assert len(facts) == len(skills.CAPITALS) == 64
    assert {s.prompt: s.response for s in facts} == {
        f"capital of {k}:": v for k, v in skills.CAPITALS.items()
    }


def test_the_share_of_tests_is_as_said():
    rng = random.Random(0)
    prompts = {skills.SKILLS["reverse"](rng).prompt for _ in range(5_000)}
    share = sum(map(skills.is_test_prompt, prompts)) / len(prompts)
    assert share == pytest.approx(skills.TEST_SHARE, abs=0.02)


def test_drawing_depends_on_the_seed_alone():
    assert skills.new_skill_train(50, 3) == skills.new_skill_train(50, 3) != skills.new_skill_train(50, 4)
    assert skills.held_out_text(30, 3) == skills.held_out_text(30, 3) != skills.held_out_text(30, 4)
    first, again = skills.pretraining_samples(0), skills.pretraining_samples(0)
    assert list(islice(first, 2_000)) == list(islice(again, 2_000))


def test_more_prompts_than_there_are():
    with pytest.raises(ValueError, match="ask for fewer"):
        skills.tests("add", 1_200, 0)


def test_prompts_are_distinct():
    for samples in (skills.new_skill_train(1_000, 0), *skills.old_skill_tests(200, 0).values()):
        assert len({s.prompt for s in samples}) == len(samples)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_wrong_answers_are_as_many_as_asked_and_really_wrong(share: float):
    noisy = skills.new_skill_train(1_000, 0, wrong_share=share)
    right = skills.new_skill_train(1_000, 0, wrong_share=0)
    assert [s.prompt for s in noisy] == [s.prompt for s in right]
    wrong = [(a, b) for a, b in zip(noisy, right, strict=True) if a.response != b.response]
    assert len(wrong) == pytest.approx(share * 1_000, abs=50)
    assert all(sorted(a.response) == sorted(b.response) for a, b in wrong)


def test_the_new_skill_is_rare_in_pretraining_and_no_old_skill():
    assert skills.NEW_SKILL not in skills.OLD_SKILLS
    share = skills.PRETRAINING_MIX[skills.NEW_SKILL] / sum(skills.PRETRAINING_MIX.values())
    assert 0 < share < 0.005
    assert set(skills.PRETRAINING_MIX) == set(skills.SKILLS)


def test_held_out_text_covers_old_skills_and_stories():
    text = skills.held_out_text(80, 0)
    for name in (*skills.OLD_SKILLS, "story"):
        start = "capital of" if name == "fact" else name
        assert sum(s.prompt.startswith(start) for s in text) == 10
    assert not any(s.prompt.startswith(skills.NEW_SKILL) for s in text)
