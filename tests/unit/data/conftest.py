"""Real tokenizers of three kinds, trained here on a few sentences."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from asft_nemo.data import TextTokenizer

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
EOS, PAD, BOS = "<|end|>", "<|pad|>", "<s>"
SENTENCES = [
    "### Response:The answer is 42. The answer is 7.",
    "### Instruction: add two numbers and write the answer",
    "question: answer: Response: :The :An a: the quick brown fox é ü 東京",
] * 20
# The split of GPT-4's tokenizer in small: letters keep the character before them, digits go in threes.
GPT4_SPLIT = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(split: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Byte-level BPE; without a split of its own it merges across every boundary."""
    tokenizer = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = bytes_only if split is None else pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def gpt2_like() -> Tokenizer:
    return byte_level(pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"))


def tiktoken_like() -> Tokenizer:
    return byte_level(pre_tokenizers.Split(GPT4_SPLIT, "isolated"))


def sentencepiece_like() -> Tokenizer:
    """Llama-2's form: blanks become underscores, one is put in front, bytes stand in for unknown characters, BOS first."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", BOS, EOS, PAD, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in SENTENCES], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def unigram_like() -> Tokenizer:
    """SentencePiece's Unigram as Hugging Face converts it: Metaspace in front of the first word alone; control tokens are pieces, too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<unk>", BOS, EOS, PAD],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(32, 127)] + list("\n\té東京ü"),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2_like": gpt2_like,
    "tiktoken_like": tiktoken_like,
    "sentencepiece_like": sentencepiece_like,
    "unigram_like": unigram_like,
    "merges_anything": byte_level,
}


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face directory per kind: tokenizer files and a config.json of a matching vocabulary."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, build in KINDS.items():
        tokenizer = build()
        tokenizer.add_special_tokens(CHAT_TOKENS)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=EOS,
            pad_token=PAD,
            bos_token=BOS if name in ("sentencepiece_like", "unigram_like") else None,
        )
        fast.save_pretrained(root / name)
        shape = {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 256,
            "vocab_size": len(fast),
        }
        (root / name / "config.json").write_text(json.dumps(shape))
    return {name: root / name for name in KINDS}


@pytest.fixture(params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest, tokenizer_dirs: dict[str, Path]) -> TextTokenizer:
    """Each kind in turn."""
    return TextTokenizer.load(tokenizer_dirs[request.param])


@pytest.fixture
def gpt2(tokenizer_dirs: dict[str, Path]) -> TextTokenizer:
    """The ordinary kind."""
    return TextTokenizer.load(tokenizer_dirs["gpt2_like"])


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON Lines: objects, or text and bytes as they are."""

    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        lines = [
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row)).encode() + b"\n"
            for row in rows
        ]
        path = tmp_path / name
        path.write_bytes(b"".join(lines))
        return path

    return write


@pytest.fixture
def model(tokenizer_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A model's directory with a chat template."""
    folder = shutil.copytree(tokenizer_dirs["gpt2_like"], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a file, each recorded as done."""
    monkeypatch.setattr("asft_nemo.data.workers._CHUNK_ROWS", 7)
    monkeypatch.setattr("asft_nemo.data.files._BATCH", 5)
    monkeypatch.setattr("asft_nemo.data.store._SAVE_SECONDS", 0.0)
