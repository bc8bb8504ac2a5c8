"""The published sets that `asft data download` knows. A set more = one row of `SETS`.

Nothing here is guessed: a digest, a size or a revision that could not be learned from two sources, or from the file itself, is None or
`main`. Where the digests come from: GSM8K, MedQA, AIME24, HumanEval and alpaca_eval from the files themselves, which are the ones that the
evaluation suites read, and their pinned revisions from manifests of public repositories that name the same digests; the others from such
manifests alone (NuminaMath-CoT of chichi56/ASFT: the third-party notices of a fork of LLaMA-Factory; OpenMathInstruct-2: the hub's own
metadata as recorded at the revision; Magicoder, MATH-500, MedMCQA, MMLU: two independent ones each). No download from here has been made yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Hub:
    """A file of a dataset repository of the Hugging Face hub."""

    repo: str
    revision: str
    path: str

    def __str__(self) -> str:
        return f"https://huggingface.co/datasets/{self.repo}/resolve/{self.revision}/{self.path}"


@dataclass(frozen=True)
class Web:
    """A file at an address."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Lines:
    """A Parquet file's rows as JSON Lines, for the evaluation suites.

    Attributes:
        name: where they are written below the folder.
        subjects: values of `subject` that are kept; empty = every row.
    """

    name: str
    subjects: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedFile:
    """One file of a set.

    Attributes:
        name: where it is put below the folder; evaluation sets lie where the suites look for them.
        source: where it comes from.
        sha256: of its bytes; None = the digest of the first download is kept and later ones must equal it.
        size: in bytes; None = what the server says.
        lines: what is made of it.
    """

    name: str
    source: Hub | Web
    sha256: str | None
    size: int | None
    lines: Lines | None = None


@dataclass(frozen=True)
class PublishedSet:
    """What one name downloads.

    Attributes:
        what: in a few words.
        rows: of all its files; None = not known for certain.
        licence: as its publishers state it.
        files: its files.
    """

    what: str
    rows: int | None
    licence: str
    files: tuple[PublishedFile, ...]


_AUTHORS = "chichi56/ASFT"
_NUMINA = {
    "10k": (10_000, "a172916f9661937772d123e614cf1066b6c0586d2a871a8548988750d5a96b18"),
    "30k": (30_000, "ff07c61ad51b3d3fccd7d683aa6e599a1079f81d637d6338525925a3e326024e"),
    "100k": (100_000, "0c978394aa05b4254b0094926dca56159d4edb2bd409e313439d8344a25a6d06"),
}
_OPEN_MATH = (
    (212_931_526, "93700f39cdc87994f2c9a6ad62e1d62e09467793f57d376cfab722757ff26e1c"),
    (213_248_631, "c208b3cda82903d9923cb0b1286b30ce9de0d2e56641cac32435b171be36b912"),
    (212_872_872, "1a42cf7139b60ece5e14623626e1a0b9cdaadd5460704183395780ce26849e51"),
)
_GSM8K = (
    "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data"
)
# The subjects of MMLU that the suite mmlu_medical asks.
_MEDICAL = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_medicine",
    "high_school_biology",
    "high_school_psychology",
    "human_aging",
    "medical_genetics",
    "nutrition",
    "professional_medicine",
    "virology",
)
_MEDMCQA, _MEDMCQA_REVISION = "openlifescienceai/medmcqa", "91c6572c454088bf71b679ad90aa8dffcd0d5868"


def _numina(size: str) -> PublishedSet:
    rows, digest = _NUMINA[size]
    file = f"numina_cot_{size}.jsonl"
    return PublishedSet(
        f"the ASFT authors' training set, mathematics, {size} rows of NuminaMath-CoT",
        rows,
        "Apache-2.0 (of AI-MO/NuminaMath-CoT, which it is taken from)",
        (PublishedFile(f"train/{file}", Hub(_AUTHORS, "main", file), digest, None),),
    )


def _medmcqa(size: str) -> PublishedSet:
    file = f"train_medmcqa_alpaca_{size}.jsonl"
    return PublishedSet(
        f"the ASFT authors' training set, medicine, {size} rows of MedMCQA",
        None,
        "MIT (of medmcqa/medmcqa, which it is taken from)",
        (PublishedFile(f"train/{file}", Hub(_AUTHORS, "main", file), None, None),),
    )


def _open_math(part: int) -> PublishedFile:
    size, digest = _OPEN_MATH[part]
    file = f"data/train_1M-{part:05d}-of-{len(_OPEN_MATH):05d}.parquet"
    source = Hub("nvidia/OpenMathInstruct-2", "469216e3f46f4dacf476b382e192485ea51a143e", file)
    return PublishedFile(f"train/openmathinstruct2/{file.removeprefix('data/')}", source, digest, size)


SETS: Mapping[str, PublishedSet] = MappingProxyType(
    {
        **{f"numina-cot-{size}": _numina(size) for size in _NUMINA},
        **{f"medmcqa-asft-{size}": _medmcqa(size) for size in ("10k", "30k", "100k")},
        "openmathinstruct-2": PublishedSet(
            "NVIDIA's OpenMathInstruct-2, its subset train_1M",
            1_000_000,
            "CC-BY-4.0",
            tuple(_open_math(part) for part in range(len(_OPEN_MATH))),
        ),
        "magicoder-evol": PublishedSet(
            "Magicoder-Evol-Instruct-110K, code",
            111_183,
            "Apache-2.0",
            (
                PublishedFile(
                    "train/magicoder_evol.jsonl",
                    Hub(
                        "ise-uiuc/Magicoder-Evol-Instruct-110K",
                        "b0079beaa0361d82412520b873715bee59cc7dd4",
                        "data-evol_instruct-decontaminated.jsonl",
                    ),
                    "99d8bab4c443050e5bb4bc339f709de8bcccf81cb83e15ef8d53369c5d8dc495",
                    None,
                ),
            ),
        ),
        "medmcqa-train": PublishedSet(
            "MedMCQA, its whole training split",
            182_822,
            "MIT (the hub's card says Apache-2.0)",
            (
                PublishedFile(
                    "train/medmcqa_train.parquet",
                    Hub(_MEDMCQA, _MEDMCQA_REVISION, "data/train-00000-of-00001.parquet"),
                    "b119434ba551517a6ec0ba1f7e0b4c029165ed284a4704f262ce37c791c493c5",
                    None,
                ),
            ),
        ),
        "gsm8k": PublishedSet(
            "GSM8K, training and test",
            7473 + 1319,
            "MIT",
            (
                PublishedFile(
                    "math/gsm8k_train.jsonl",
                    Web(f"{_GSM8K}/train.jsonl"),
                    "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                    4_166_206,
                ),
                PublishedFile(
                    "math/gsm8k_test.jsonl",
                    Web(f"{_GSM8K}/test.jsonl"),
                    "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
                    749_738,
                ),
            ),
        ),
        "math500": PublishedSet(
            "MATH-500, evaluation",
            500,
            "MIT (of hendrycks/math, which it is taken from)",
            (
                PublishedFile(
                    "math/math500_test.jsonl",
                    Hub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test.jsonl"),
                    "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
                    None,
                ),
            ),
        ),
        "aime24": PublishedSet(
            "AIME 2024, evaluation",
            30,
            "problems by the MAA; none stated",
            (
                PublishedFile(
                    "math/aime24_test.jsonl",
                    Web(
                        "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/"
                        "evaluation/data/aime24/test.jsonl"
                    ),
                    "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
                    156_944,
                ),
            ),
        ),
        "medqa": PublishedSet(
            "MedQA (USMLE, four options), evaluation",
            1273,
            "MIT (of jind11/MedQA; the hub's card says CC-BY-4.0)",
            (
                PublishedFile(
                    "medical/medqa_test.jsonl",
                    Hub(
                        "GBaker/MedQA-USMLE-4-options",
                        "0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18",
                        "phrases_no_exclude_test.jsonl",
                    ),
                    "c3b905ccfa66152dc25afbcb2c10e86c0bdb208824f0658fcdb2c040f60a2beb",
                    2_075_679,
                ),
            ),
        ),
        "medmcqa": PublishedSet(
            "MedMCQA, its validation split, evaluation",
            4183,
            "MIT (the hub's card says Apache-2.0)",
            (
                PublishedFile(
                    "medical/medmcqa_validation.parquet",
                    Hub(_MEDMCQA, _MEDMCQA_REVISION, "data/validation-00000-of-00001.parquet"),
                    "b768a1ea34afc9f80d3106d9b21f80fa8a00ec450a1f6cd641af72ca9e591021",
                    None,
                    Lines("medical/medmcqa_test.jsonl"),
                ),
            ),
        ),
        "mmlu": PublishedSet(
            "MMLU, test split, all 57 subjects; the medical ones as JSON Lines, evaluation",
            14_042,
            "MIT",
            (
                PublishedFile(
                    "medical/mmlu_test.parquet",
                    Hub(
                        "cais/mmlu",
                        "c30699e8356da336a370243923dbaf21066bb9fe",
                        "all/test-00000-of-00001.parquet",
                    ),
                    "74a41822ce7d3def56e1682f958469c04642a5336a5ce912fa375fdb90fb25d7",
                    None,
                    Lines("medical/mmlu_medical_test.jsonl", _MEDICAL),
                ),
            ),
        ),
        "humaneval": PublishedSet(
            "HumanEval, evaluation",
            164,
            "MIT",
            (
                PublishedFile(
                    "code/HumanEval.jsonl.gz",
                    Web(
                        "https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/"
                        "data/HumanEval.jsonl.gz"
                    ),
                    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
                    44_877,
                ),
            ),
        ),
        "alpaca_eval": PublishedSet(
            "AlpacaEval, instructions and reference answers, evaluation (a JSON array)",
            805,
            "CC-BY-NC-4.0 (as sets made from it state)",
            (
                PublishedFile(
                    "instruct/alpaca_eval.json",
                    Hub(
                        "tatsu-lab/alpaca_eval",
                        "2edc6fad8be6b14ea7230aabfd08188da6b8b814",
                        "alpaca_eval.json",
                    ),
                    "d92b92c51e8f1962a21193abe74e6f727c2bc8286035f4041505ff38a7c3ae51",
                    620_778,
                ),
            ),
        ),
    }
)
