"""Items are shifted, padded and masked right, and everything left out is counted."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from asft_nemo.config.schema import DataConfig, FieldsConfig
from asft_nemo.data import (
    FILLER,
    Rendered,
    SupervisedDataset,
    TextTokenizer,
    Tokenized,
    inspect_files,
    render,
)
from asft_nemo.errors import DataError

Writer = Callable[..., Path]
ROW = {"q": "add two numbers", "a": "The answer is 42."}


def config(**changes: object) -> DataConfig:
    values = {
        "fields": FieldsConfig(prompt="q", response="a"),
        "template": "raw",
        "sequence_length": 64,
        **changes,
    }
    return DataConfig(**values)  # type: ignore[arg-type]


def test_item_is_the_shifted_padded_example(gpt2: TextTokenizer, jsonl: Writer) -> None:
    item = SupervisedDataset.from_files([jsonl(ROW)], config(), tokenizer=gpt2)[0]
    [example] = gpt2.encode([render("raw", ROW["q"], ROW["a"])])
    count = len(example.tokens) - 1
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
        "tokens": (torch.int64, (64,)),
        "labels": (torch.int64, (64,)),
        "loss_mask": (torch.bool, (64,)),
        "position_ids": (torch.int64, (64,)),
        "sample_id": (torch.int64, ()),
        "domain_id": (torch.int64, ()),
    }
    assert item["tokens"][:count].tolist() == example.tokens[:-1]
    assert item["labels"][:count].tolist() == example.tokens[1:]
    assert (item["tokens"][count:] == gpt2.pad_id).all()
    assert item["position_ids"].tolist() == list(range(64))
    assert gpt2.decode(item["labels"][item["loss_mask"]].tolist()) == ROW["a"] + "<|end|>"
    # The prompt's last token predicts the response's first.
    first = int(item["loss_mask"].nonzero()[0])
    assert gpt2.decode(item["tokens"][: first + 1].tolist()) == ROW["q"]


def test_every_item_of_random_rows_learns_exactly_its_response(gpt2: TextTokenizer, jsonl: Writer) -> None:
    rng = random.Random(0)
    words = ["The", "answer", "is", "42", "é", "fox", "\n", "東京", ":"]
    rows = [{key: " ".join(rng.choices(words, k=rng.randint(1, 6))) + "x" for key in "qa"} for _ in range(50)]
    dataset = SupervisedDataset.from_files([jsonl(*rows)], config(), tokenizer=gpt2)
    assert len(dataset) == 50
    for row, item in zip(rows, (dataset[i] for i in range(50)), strict=True):
        text = gpt2.decode(item["labels"][item["loss_mask"]].tolist())
        assert text == row["a"] + "<|end|>"
        assert item["labels"][item["loss_mask"]].tolist().count(gpt2.eos_id) == 1
    assert dataset.report.learned_tokens == sum(int(dataset[i]["loss_mask"].sum()) for i in range(50))
    assert dataset.report.tokens == sum(
        len(gpt2.encode([render("raw", r["q"], r["a"])])[0].tokens) - 1 for r in rows
    )


def test_loss_on_all_learns_everything_but_the_first_token(gpt2: TextTokenizer, jsonl: Writer) -> None:
    dataset = SupervisedDataset.from_files([jsonl(ROW)], config(loss_on="all"), tokenizer=gpt2)
    assert int(dataset[0]["loss_mask"].sum()) == dataset.report.tokens == dataset.report.learned_tokens


def test_sample_ids_are_row_numbers_over_all_files(gpt2: TextTokenizer, jsonl: Writer) -> None:
    one = jsonl(ROW, {"q": "x"}, ROW, name="one.jsonl")
    two = jsonl(ROW, name="two.jsonl")
    dataset = SupervisedDataset.from_files([one, two], config(on_bad_row="skip"), tokenizer=gpt2)
    assert [int(dataset[i]["sample_id"]) for i in range(len(dataset))] == [0, 2, 3]


def test_domain_ids_are_places_among_the_files(gpt2: TextTokenizer, jsonl: Writer) -> None:
    one, two = jsonl({"q": "x"}, ROW, ROW, name="one.jsonl"), jsonl(ROW, name="two.jsonl")
    dataset = SupervisedDataset.from_files([two, one, two], config(on_bad_row="skip"), tokenizer=gpt2)
    assert [int(dataset[i]["domain_id"]) for i in range(len(dataset))] == [0, 1, 1, 2]


def test_sample_ids_do_not_depend_on_the_chunking(
    gpt2: TextTokenizer, jsonl: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(ROW, {"q": "x"}, ROW, ROW, {"q": 1}, ROW)
    monkeypatch.setattr("asft_nemo.data.loading._CHUNK", 2)
    dataset = SupervisedDataset.from_files([path], config(on_bad_row="skip"), tokenizer=gpt2)
    assert [int(dataset[i]["sample_id"]) for i in range(len(dataset))] == [0, 2, 3, 5]


def test_filler_item_learns_nothing(gpt2: TextTokenizer, jsonl: Writer) -> None:
    dataset = SupervisedDataset.from_files([jsonl(ROW)], config(), tokenizer=gpt2)
    item = dataset[FILLER]
    assert not item["loss_mask"].any()
    assert int(item["sample_id"]) == int(item["domain_id"]) == FILLER
    assert item["tokens"].shape == dataset[0]["tokens"].shape
    for index in (1, -2):
        with pytest.raises(IndexError):
            dataset[index]


def test_items_collate(gpt2: TextTokenizer, jsonl: Writer) -> None:
    dataset = SupervisedDataset.from_files([jsonl(ROW, ROW, ROW)], config(), tokenizer=gpt2)
    [batch] = DataLoader(dataset, batch_sampler=[[0, 2, FILLER]])  # type: ignore[arg-type]
    assert batch["tokens"].shape == (3, 64)
    assert batch["sample_id"].tolist() == [0, 2, FILLER]


def lengths(tokenizer: TextTokenizer, *rows: dict[str, str]) -> list[int]:
    return [len(tokenizer.encode([render("raw", row["q"], row["a"])])[0].tokens) for row in rows]


LONG = {"q": "add two numbers", "a": "The answer is 42. " * 9}


def test_too_long_is_dropped_counted_and_said(
    gpt2: TextTokenizer, jsonl: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="asft_nemo"):
        dataset = SupervisedDataset.from_files([jsonl(ROW, LONG)], config(sequence_length=30), tokenizer=gpt2)
    assert len(dataset) == dataset.report.kept == 1
    assert dataset.report.too_long == 1
    assert dataset.report.lengths == lengths(gpt2, ROW, LONG)
    assert "1 of 2 examples are longer than data.sequence_length=30 and were dropped" in caplog.text


def test_truncated_keeps_its_beginning_without_end_token(
    gpt2: TextTokenizer, jsonl: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    data = config(sequence_length=30, on_too_long="truncate")
    with caplog.at_level(logging.WARNING, logger="asft_nemo"):
        dataset = SupervisedDataset.from_files([jsonl(ROW, LONG)], data, tokenizer=gpt2)
    [whole] = gpt2.encode([render("raw", LONG["q"], LONG["a"])])
    item = dataset[1]
    assert item["tokens"].tolist() == whole.tokens[:30]
    assert item["labels"].tolist() == whole.tokens[1:31]
    assert int(item["loss_mask"].sum()) == 31 - whole.learned.index(True)
    assert gpt2.eos_id not in item["labels"].tolist()
    assert "1 of 2 examples are longer than data.sequence_length=30 and were truncated" in caplog.text


def test_truncation_that_leaves_no_response_drops_the_row(gpt2: TextTokenizer, jsonl: Writer) -> None:
    hopeless = {"q": "add two numbers " * 9, "a": "42"}
    data = config(sequence_length=20, on_too_long="truncate")
    dataset = SupervisedDataset.from_files([jsonl(ROW, hopeless)], data, tokenizer=gpt2)
    assert len(dataset) == 1
    assert dataset.report.no_response_left == 1


def test_an_example_that_just_fits_is_kept(gpt2: TextTokenizer, jsonl: Writer) -> None:
    [length] = lengths(gpt2, ROW)
    fits = config(sequence_length=length - 1)
    assert len(SupervisedDataset.from_files([jsonl(ROW)], fits, tokenizer=gpt2)) == 1
    with pytest.raises(DataError, match=f"the shortest has {length} tokens"):
        SupervisedDataset.from_files([jsonl(ROW)], config(sequence_length=length - 2), tokenizer=gpt2)


def test_too_long_can_fail_with_file_and_line(gpt2: TextTokenizer, jsonl: Writer) -> None:
    path = jsonl(ROW, LONG)
    with pytest.raises(DataError, match=rf"{path}:2: \d+ tokens do not fit data.sequence_length=30"):
        SupervisedDataset.from_files([path], config(sequence_length=30, on_too_long="fail"), tokenizer=gpt2)


def test_bad_rows_fail_or_are_skipped(
    gpt2: TextTokenizer, jsonl: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(ROW, "oops", {"q": "x", "a": ""})
    with pytest.raises(DataError, match="2 bad rows") as caught:
        SupervisedDataset.from_files([path], config(), tokenizer=gpt2)
    assert f"{path}:2: not JSON" in str(caught.value)
    assert f"{path}:3: field 'a' is empty" in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="asft_nemo"):
        assert len(SupervisedDataset.from_files([path], config(on_bad_row="skip"), tokenizer=gpt2)) == 1
    assert "2 bad rows skipped" in caplog.text
    with pytest.raises(DataError, match="all 1 rows are bad"):
        SupervisedDataset.from_files([jsonl("oops")], config(on_bad_row="skip"), tokenizer=gpt2)


def chat_model(folder: Path, target: Path) -> TextTokenizer:
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return TextTokenizer.load(target)


def test_conversations_become_items_under_the_chat_template(
    tokenizer_dirs: dict[str, Path], jsonl: Writer, tmp_path: Path
) -> None:
    tokenizer = chat_model(tokenizer_dirs["gpt2_like"], tmp_path / "model")
    talk = [("user", "a"), ("assistant", "The"), ("user", "b"), ("assistant", "fox")]
    row = {"messages": [{"role": role, "content": text} for role, text in talk]}
    unlearned = {"messages": [*row["messages"][:3], {**row["messages"][3], "weight": 0}]}
    path = jsonl(row, unlearned, {"messages": []})

    def said(loss_on: str) -> list[str]:
        data = config(template="chat", loss_on=loss_on, fields=FieldsConfig(), on_bad_row="skip")
        dataset = SupervisedDataset.from_files([path], data, tokenizer=tokenizer)
        items = [dataset[i] for i in range(len(dataset))]
        assert dataset.report.learned_tokens == sum(int(item["loss_mask"].sum()) for item in items)
        assert dataset.learned_tokens([0]) == int(items[0]["loss_mask"].sum())
        return [tokenizer.decode(item["labels"][item["loss_mask"]].tolist()) for item in items]

    assert said("response") == said("last_assistant") == ["fox<|im_end|>"]
    assert said("all_assistant") == ["The<|im_end|>fox<|im_end|>", "The<|im_end|>"]
    assert said("all")[0].startswith("user\na<|im_end|>")
    strict = config(template="chat", fields=FieldsConfig())
    with pytest.raises(DataError, match="2 bad rows") as caught:
        SupervisedDataset.from_files([path], strict, tokenizer=tokenizer)
    assert f"{path}:2: no message is learned: the weight of each is 0" in str(caught.value)
    assert f"{path}:3: field 'messages' is empty" in str(caught.value)
    with pytest.raises(DataError, match=r"a conversation of 4 messages does not fit data\.template=raw"):
        SupervisedDataset.from_files([path], config(fields=FieldsConfig()), tokenizer=tokenizer)


def test_an_example_without_a_learned_token_is_a_bad_row(
    gpt2: TextTokenizer, jsonl: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(ROW, "oops", ROW)
    whole = TextTokenizer.encode

    def nothing_in_the_first(self: TextTokenizer, examples: Sequence[Rendered]) -> list[Tokenized]:
        first, *rest = whole(self, examples)
        return [Tokenized(first.tokens, [True] + [False] * (len(first.tokens) - 1)), *rest]

    monkeypatch.setattr(TextTokenizer, "encode", nothing_in_the_first)
    report = inspect_files([path], config(), tokenizer=gpt2)
    assert str(report.bad[0]) == f"{path}:1: no token of it would be learned"
    assert [row.line for row in report.bad] == [1, 2]
    assert report.total().kept == 1


def test_more_bad_rows_than_the_limit_are_not_skipped(gpt2: TextTokenizer, jsonl: Writer) -> None:
    path = jsonl(ROW, "oops", ROW, "oops")
    skip = config(on_bad_row="skip", max_bad_rows=2)
    assert len(SupervisedDataset.from_files([path], skip, tokenizer=gpt2)) == 2
    with pytest.raises(DataError, match=r"2 bad rows are more than data\.max_bad_rows=1"):
        SupervisedDataset.from_files([path], config(on_bad_row="skip", max_bad_rows=1), tokenizer=gpt2)


def test_a_tokenizer_larger_than_the_model_is_refused(gpt2: TextTokenizer, jsonl: Writer) -> None:
    with pytest.raises(DataError, match="use the model's own tokenizer"):
        SupervisedDataset.from_files([jsonl(ROW)], config(), tokenizer=gpt2, vocab_size=gpt2.size - 1)
    SupervisedDataset.from_files([jsonl(ROW)], config(), tokenizer=gpt2, vocab_size=gpt2.size)


def test_inspection_counts_what_policies_would_refuse(gpt2: TextTokenizer, jsonl: Writer) -> None:
    data = config(sequence_length=30, on_too_long="fail")
    report = inspect_files([jsonl(ROW, "oops", LONG)], data, tokenizer=gpt2)
    summary = report.total().summary()
    assert (summary["rows"], summary["usable"], summary["bad"], summary["too_long"], summary["kept"]) == (
        3,
        2,
        1,
        1,
        1,
    )
    assert summary["lengths"]["longest"] == max(lengths(gpt2, ROW, LONG))
    assert summary["lengths"]["shortest"] == min(lengths(gpt2, ROW, LONG))
