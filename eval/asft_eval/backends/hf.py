"""transformers on a CPU, one GPU, or several that share a model's layers: batched generation with left padding, greedy or drawn, and log probabilities of given text."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from asft_eval.backends import Done, LogLikelihood, ignore
from asft_eval.backends.drawing import SeededDraw
from asft_eval.backends.memory import memory_for, out_of_memory
from asft_eval.backends.placement import spread, weight_bytes
from asft_eval.backends.tokens import (
    MEND,
    choice_tokens,
    completion,
    encode_pair,
    end_tokens,
    load_tokenizer,
    not_numbers,
    prompt_tokens,
    require_model,
    require_numbers,
    require_room,
    require_seeds,
)
from asft_eval.errors import EvaluationError, one_line
from asft_eval.types import Completion, Protocol

log = logging.getLogger(__name__)

_LOGITS_AT_ONCE = 2**25
"""Numbers in a block of logits: 128 MiB in fp32."""


def load_model(model_dir: Path | str, *, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """A causal language model in evaluation mode.

    Args:
        model_dir: a Hugging Face model directory.
        dtype: of weights and arithmetic; None means fp32 on a CPU and the checkpoint's own on a GPU.
        device: a torch device; None means the GPU where there is one, and all visible ones, each with a share of the layers, where the
            first cannot hold the model.

    Raises:
        EvaluationError: no such directory, no config or weights in it, transformers cannot read them, or the GPUs or the memory are too small.
    """
    model_dir = Path(model_dir)
    require_model(model_dir)
    with memory_for(f"to load {model_dir}"):
        return _loaded(model_dir, dtype, device)


def _loaded(model_dir: Path, dtype: torch.dtype | None, device: str | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    room = None if device or not torch.cuda.is_available() else _room(model_dir, dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else None
    where: dict[str, Any] = {} if room is None else {"device_map": "auto", "max_memory": room}
    try:
        opener: Any = AutoConfig
        _require_rope_read(model_dir, opener.from_pretrained(model_dir, local_files_only=True))
        opener = AutoModelForCausalLM
        model, told = opener.from_pretrained(
            model_dir, dtype=dtype or "auto", local_files_only=True, output_loading_info=True, **where
        )
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise EvaluationError(f"transformers cannot load {model_dir} ({one_line(error)}): {MEND}") from error
    # transformers fills what is missing with random numbers and goes on.
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise EvaluationError(
            f"{model_dir} lacks weights of the model ({len(missing)}, e.g. {missing[0]}): {MEND}"
        )
    if room is None:
        return model.to(device).eval()
    places = set(model.hf_device_map.values())
    if not places <= set(room):  # layers are not divided, so a little more may be needed than the sum says
        raise EvaluationError(
            f"the layers of {model_dir} do not all fit the {len(room)} visible GPUs: run where more are visible (CUDA_VISIBLE_DEVICES)"
        )
    log.info("%s lies on %d GPUs", model_dir, len(places))
    return model.eval()


def _require_rope_read(model_dir: Path, config: Any) -> None:
    """transformers 4 takes `rope_parameters`, which transformers 5 writes, for a field of nobody's and the class's own rope_theta for the model's.

    Raises:
        EvaluationError: it would compute another rotary embedding than the model's.
    """
    version, config = importlib.metadata.version("transformers"), config.get_text_config()
    told: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    scaling: dict[str, Any] = getattr(config, "rope_scaling", None) or {}
    read = {"rope_type": "default", **scaling, "rope_theta": getattr(config, "rope_theta", None)}
    if int(version.partition(".")[0]) < 5 and any(read.get(key) != value for key, value in told.items()):
        raise EvaluationError(
            f"{model_dir}/config.json says rope_parameters, which transformers {version} does not read (it takes rope_theta={read['rope_theta']}): write "
            "its rope_theta, and as rope_scaling the rest, beside it, or use an environment with transformers 5"
        )


def _room(model_dir: Path, dtype: torch.dtype | None) -> dict[int, int] | None:
    free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    return spread(model_dir, weight_bytes(model_dir, dtype and dtype.itemsize), free)


def context(config: Any) -> float:
    """Tokens that a model takes at once, by its configuration, as vLLM reads it; infinite where that does not say."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return math.inf
    rope: dict[str, Any] = getattr(config, "rope_scaling", None) or {}
    # Other forms of scaling are already in max_position_embeddings.
    stretched = (
        rope.get("rope_type", rope.get("type")) in ("linear", "dynamic") and "gemma3" not in config.model_type
    )
    return int(positions * (rope.get("factor") or 1)) if stretched else int(positions)


def left_padded(
    encoded: Sequence[list[int]], *, pad_id: int, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """One batch to go on from: `input_ids` and `attention_mask`, `[b, s]`."""
    width = max(map(len, encoded))
    tokens = [[pad_id] * (width - len(ids)) + ids for ids in encoded]
    attention = [[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded]
    return {
        "input_ids": torch.tensor(tokens, device=device),
        "attention_mask": torch.tensor(attention, device=device),
    }


def right_padded(
    encoded: Sequence[tuple[list[int], int]], *, pad_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One batch for scoring: token ids `[b, s]`, attention mask `[b, s]`, labels `[b, s]` (already shifted), loss mask `[b, s]` (bool).

    The loss mask is True where the label is a token of the continuation (or the end token after it).
    """
    width = max(len(ids) for ids, _ in encoded)
    tokens = torch.full((len(encoded), width), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(tokens)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (ids, prompt_length) in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        attention[row, : len(ids)] = 1
        loss_mask[row, prompt_length - 1 : len(ids) - 1] = True
    labels = tokens.roll(-1, dims=1)
    return tokens.to(device), attention.to(device), labels.to(device), loss_mask.to(device)


def _label_logprob(logits_KV: torch.Tensor, columns: Sequence[int], labels: Sequence[int]) -> float:
    """The sum of the labels' log probabilities in fp32, one label a column; a block of logits at a time is in fp32."""
    size = max(1, _LOGITS_AT_ONCE // logits_KV.shape[-1])
    total = 0.0
    for at in range(0, len(labels), size):
        logprobs_TV = logits_KV[columns[at : at + size]].float().log_softmax(-1)
        own = torch.tensor(labels[at : at + size], device=logprobs_TV.device)
        total += float(logprobs_TV.gather(-1, own[:, None]).sum())
    return total


class _Numbers:
    """A logits processor that changes nothing and notes, without waiting for the device, whether every row had a most probable token."""

    def __init__(self) -> None:
        self._sound: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores `[b, v]` as they are."""
        del input_ids
        sound = scores.amax(-1).isfinite().all()  # NaN is the largest number to amax
        self._sound = sound if self._sound is None else self._sound & sound
        return scores

    def require(self, model: Path | str) -> None:
        """Raises where something drawn or chosen so far was of NaN or infinite logits."""
        if self._sound is not None and not bool(self._sound):
            raise not_numbers(model)


def _drawing(protocol: Protocol, seeds: Sequence[int]) -> list[SeededDraw]:
    return (
        [SeededDraw(seeds, temperature=protocol.temperature, top_p=protocol.top_p)]
        if protocol.temperature > 0
        else []
    )


class HfBackend:
    """A model directory run by transformers.

    Args:
        model_dir: a Hugging Face model directory with tokenizer files.
        batch_size: prompts run together.
        dtype: see `load_model`.
        device: see `load_model`.

    Raises:
        EvaluationError: the model cannot be loaded, or computes no numbers.
    """

    name = "hf"

    def __init__(
        self,
        model_dir: Path | str,
        *,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ):
        import transformers

        library: Any = transformers
        if batch_size < 1:
            raise EvaluationError(f"batch_size is {batch_size}: give at least 1")
        self.versions: Mapping[str, str] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self.tokenizer = load_tokenizer(model_dir)
        self.model = load_model(model_dir, dtype=dtype, device=device)
        # What generation_config.json or config.json say of drawing, e.g. a repetition penalty, holds for greedy completions, too.
        self.model.generation_config = library.GenerationConfig()
        self._name = model_dir
        self.room = context(self.model.config)
        self.batch_size = batch_size
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.loglikelihood(
            [("one", " two three")]
        )  # before hours are spent on a model that computes no numbers

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        protocol: Protocol,
        seeds: Sequence[int] = (),
        done: Done[Completion] = ignore,
    ) -> list[Completion]:
        """Completions, greedy or drawn, which end with the model's context. Prompts of similar length share a batch, so that little is padding.

        Raises:
            EvaluationError: a prompt is as long as the model's context, or there is not one seed a prompt.
        """
        require_seeds(prompts, protocol, seeds)
        starts = [prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        require_room(map(len, starts), self.room)
        limits = [int(min(protocol.max_tokens, self.room - len(ids))) for ids in starts]
        completions: dict[int, Completion] = {}
        for places in self._batches([len(ids) for ids in starts], limits):
            batch = left_padded(
                [starts[i] for i in places], pad_id=self.tokenizer.pad_token_id, device=self.model.device
            )
            numbers = _Numbers()
            with self._memory_for(len(places)):
                out = self.model.generate(
                    **batch,
                    max_new_tokens=limits[places[0]],
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=list(end_tokens(self.tokenizer)),
                    pad_token_id=self.tokenizer.pad_token_id,
                    logits_processor=[
                        numbers,
                        *_drawing(protocol, [seeds[i] for i in places] if seeds else []),
                    ],
                )
            numbers.require(self._name)
            for place, row in zip(places, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                completions[place] = completion(self.tokenizer, row)
                done(place, completions[place])
        return [completions[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def choice_logprobs(
        self, prompts: Sequence[str], choices: Sequence[str], *, done: Done[list[float]] = ignore
    ) -> list[list[float]]:
        """For every prompt the log probability of each choice as its continuation (sum over the choice's tokens).

        Where every choice is one token, a prompt is run once and the distribution after it is read.
        """
        starts = [prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        tails = [
            [choice_tokens(self.tokenizer, start, prompt, choice) for choice in choices]
            for start, prompt in zip(starts, prompts, strict=True)
        ]
        require_room(
            (
                len(start) + max(len(tail) - (len(tail) == 1) for tail in row)
                for start, row in zip(starts, tails, strict=True)
            ),
            self.room,
        )
        found: dict[int, list[float]] = {}
        short = [i for i, row in enumerate(tails) if all(len(tail) == 1 for tail in row)]
        for places in self._batches([len(starts[i]) for i in short]):
            batch = [short[i] for i in places]
            with self._memory_for(len(batch)):
                logprobs_BV = self._after([starts[i] for i in batch])
            for row, i in enumerate(batch):
                found[i] = [float(logprobs_BV[row, tail[0]]) for tail in tails[i]]
                require_numbers(found[i], self._name)
                done(i, found[i])
        longer = [i for i in range(len(prompts)) if i not in found]
        flat = self._scores([(starts[i] + tail, len(starts[i])) for i in longer for tail in tails[i]])
        for place, i in enumerate(longer):
            found[i] = [x.logprob for x in flat[place * len(choices) : (place + 1) * len(choices)]]
            done(i, found[i])
        return [found[i] for i in range(len(prompts))]

    def _after(self, encoded: Sequence[list[int]]) -> torch.Tensor:
        """Log probabilities `[b, v]` of the token after each text, fp32."""
        tokens_BS, attention_BS, _, _ = right_padded(
            [(ids, len(ids)) for ids in encoded], pad_id=self.tokenizer.pad_token_id, device=self.model.device
        )
        last_B = [len(ids) - 1 for ids in encoded]
        places = sorted(set(last_B))
        logits_BKV = self._logits(tokens_BS, attention_BS, places)
        columns = [places.index(last) for last in last_B]
        return logits_BKV[range(len(encoded)), columns].float().log_softmax(-1)

    def _logits(
        self, tokens_BS: torch.Tensor, attention_BS: torch.Tensor, places: Sequence[int]
    ) -> torch.Tensor:
        """Logits `[b, k, v]` at these places of the texts: those of all, `[b, s, v]`, would be gigabytes, so no other goes through the head."""
        places_K = torch.tensor(places, dtype=torch.int64)
        keep = {"logits_to_keep": places_K} if self._keeps_logits else {}
        logits = self.model(input_ids=tokens_BS, attention_mask=attention_BS, use_cache=False, **keep).logits
        return logits if keep else logits[:, places_K]

    @torch.inference_mode()
    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Log probability of each continuation after its prompt, from logits in fp32; the end token is not scored."""
        encoded = [encode_pair(self.tokenizer, prompt, text, end=False) for prompt, text in pairs]
        require_room((len(ids) for ids, _ in encoded), self.room)
        return self._scores(encoded)

    def _scores(self, encoded: Sequence[tuple[list[int], int]]) -> list[LogLikelihood]:
        answers: dict[int, LogLikelihood] = {}
        for places in self._batches([len(ids) for ids, _ in encoded]):
            tokens_BS, attention_BS, _, _ = right_padded(
                [encoded[i] for i in places], pad_id=self.tokenizer.pad_token_id, device=self.model.device
            )
            scored_B = [range(encoded[i][1] - 1, len(encoded[i][0]) - 1) for i in places]
            kept = sorted(set[int]().union(*scored_B))
            column = {place: number for number, place in enumerate(kept)}
            with self._memory_for(len(places)):
                logits_BKV = self._logits(tokens_BS, attention_BS, kept)
                for row, (place, scored) in enumerate(zip(places, scored_B, strict=True)):
                    labels = encoded[place][0][encoded[place][1] :]
                    total = _label_logprob(logits_BKV[row], [column[x] for x in scored], labels)
                    answers[place] = LogLikelihood(total, len(labels))
            for place in places:
                require_numbers([answers[place].logprob], self._name)
        return [answers[i] for i in range(len(encoded))]

    def _memory_for(self, texts: int) -> AbstractContextManager[None]:
        return memory_for(
            f"for {self._name} and {texts} text{'s at once' if texts > 1 else ''}",
            before=f"give a smaller --batch-size (it is {self.batch_size})" if texts > 1 else "",
            instead="choose --backend vllm",
        )

    def _batches(self, lengths: Sequence[int], limits: Sequence[int] = ()) -> Iterator[list[int]]:
        # The longest first: what does not fit the memory shows at once, and the time left is not understated.
        places = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        # Of one limit on what is written each: then no row runs past the context, nor is cut off by its neighbours.
        for _, alike in groupby(places, key=limits.__getitem__ if limits else lambda _: 0):
            own = list(alike)
            for start in range(0, len(own), self.batch_size):
                yield own[start : start + self.batch_size]
