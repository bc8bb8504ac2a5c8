"""Whether a NeMo checkpoint computes what transformers computes from the Hugging Face one, on real text."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from asft_nemo.config import rules
from asft_nemo.config.load import compose
from asft_nemo.config.paths import project_dir
from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.errors import CheckpointError, DataError, UserError
from asft_nemo.launch_local import launch_logits
from asft_nemo.model import ModelSpec, check_trainable, read_model_spec

logger = logging.getLogger(__name__)

TEXT_FILE = "assets/verify_text.txt"
_SEQUENCES, _TOKENS = 4, 128


@dataclass(frozen=True)
class LogitsReport:
    """How far two computations of the same logits are apart.

    Attributes:
        layout: sizes of the Megatron model's layout.
        sequences, tokens: compared sequences, and positions in each.
        largest_logit: largest absolute logit of transformers.
        max_difference, mean_difference: absolute differences of logits.
        tolerance: of `max_difference`, as a share of `largest_logit`.
        top1_agreement: share of positions with the same most likely token.
        top1_wrong: positions where they differ although transformers' two best are further apart than twice `max_difference`: 0 unless
            something is wrong.
    """

    layout: dict[str, Any]
    sequences: int
    tokens: int
    largest_logit: float
    max_difference: float
    mean_difference: float
    tolerance: float
    top1_agreement: float
    top1_wrong: int

    @property
    def equal(self) -> bool:
        """Whether the differences are rounding."""
        return self.max_difference <= self.tolerance * self.largest_logit and not self.top1_wrong

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**asdict(self), "equal": self.equal}


class LogitsCheck:
    """Runs both models in fp32 over the same tokens and compares their logits.

    The weights are those of the export, computed with in fp32 whatever dtype they are stored in, so that a difference is an error of the
    conversion or of the model and not of a precision. Both models are whole in memory, one after the other: 4 bytes a parameter. Settings, text and tokenizer are
    looked at when it is made, the models when it runs.

    Args:
        ckpt_dir: NeMo checkpoint.
        hf_dir: Hugging Face directory with tokenizer files.
        overrides: settings of the layout, for example ``parallel.tp_size=2``.
        text: a text file; None for the one shipped.
        tolerance: largest difference, as a share of the largest logit.

    Raises:
        UserError: settings, text or tokenizer that cannot be used.
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        hf_dir: str | Path,
        *,
        overrides: Sequence[str] = (),
        text: str | Path | None = None,
        tolerance: float,
    ):
        self.ckpt_dir, self.hf_dir, self.tolerance = Path(ckpt_dir), Path(hf_dir), tolerance
        spec = read_model_spec(hf_dir)
        try:
            check_trainable(spec)
        except UserError as error:
            raise UserError(f"{error}; its weights can be compared with --weights-only") from error
        _require_rope_read(self.hf_dir, spec)
        limits = (_TOKENS, spec.max_position_embeddings, spec.attention_window)
        length = min(limit for limit in limits if limit is not None)
        self.run_config = _run_config(self.hf_dir, overrides, length)
        self.tokens_NS = _tokens(
            self.hf_dir, text, length=length, sequences=max(_SEQUENCES, self.run_config.parallel.pp_size)
        )

    def run(self) -> LogitsReport:
        """Computes and compares.

        Raises:
            UserError: the checkpoint cannot be used, or the machine cannot run the layout.
        """
        with tempfile.TemporaryDirectory(prefix="asft-verify-") as scratch:
            tokens_file, logits_file = (
                Path(scratch) / "tokens.safetensors",
                Path(scratch) / "logits.safetensors",
            )
            save_file({"tokens": self.tokens_NS}, tokens_file)
            logger.info("Megatron: %d sequences of %d tokens", *self.tokens_NS.shape)
            launch_logits(
                self.run_config,
                weights_dir=self.ckpt_dir / "weights",
                tokens_file=tokens_file,
                out_file=logits_file,
            )
            logger.info("transformers: the same")
            return _compare(
                self.hf_dir, self.tokens_NS, logits_file, run=self.run_config, tolerance=self.tolerance
            )


def _run_config(hf_dir: Path, overrides: Sequence[str], length: int) -> RunConfig:
    given = {word.partition("=")[0] for word in overrides}
    wrong = sorted(key for key in given if not key.startswith("parallel."))
    if wrong:
        raise DataError(f"{wrong[0]} is no setting of a layout: asft verify takes parallel.* settings only")
    settings = ["recipe=tiny_cpu", "objective=sft", "precision=fp32", f"data.sequence_length={length}"]
    run = compose([*settings, "trainer.global_batch_size=64", *overrides], check_inputs=False)
    run = replace(run, {"model.path": str(hf_dir)})  # not through a grammar that reads more than a path
    rules.check(run)
    if run.parallel.cp_size > 1:
        raise DataError(
            f"parallel.cp_size={run.parallel.cp_size} cannot be verified, for logits of whole sequences are compared; weights are the same at "
            "every cp_size: leave it out"
        )
    return run


def _require_rope_read(hf_dir: Path, spec: ModelSpec) -> None:
    """transformers 4 does not read `rope_parameters`, which transformers 5 writes, and would compute another model.

    Raises:
        CheckpointError: config.json says the rotary embedding in no other way.
    """
    from transformers import AutoConfig, __version__

    read = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)  # nosec B615 # a directory
    scaling: dict[str, Any] = getattr(read, "rope_scaling", None) or {}
    theirs = (read.rope_theta, scaling.get("rope_type", scaling.get("type", "default")))
    if theirs != (spec.rope_theta, (spec.rope_scaling or {}).get("rope_type", "default")):
        raise CheckpointError(
            f"{hf_dir}/config.json says rope_parameters, which transformers {__version__} does not read (it takes rope_theta={read.rope_theta}): "
            "write its rope_theta, and as rope_scaling the rest, beside it, or compare the weights alone with --weights-only"
        )


def _tokens(hf_dir: Path, text: str | Path | None, *, length: int, sequences: int) -> torch.Tensor:
    """The first tokens of the text, int64 [sequences, length]; the text begins anew where it is too short."""
    from transformers import AutoTokenizer

    file = project_dir() / TEXT_FILE if text is None else Path(text)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read as text ({error}): give a UTF-8 text file with --text"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 # a directory
            hf_dir, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise whatever they meet
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{hf_dir} holds no tokenizer that transformers loads ({reason}): copy the tokenizer files there, or compare "
            "the weights alone with --weights-only"
        ) from error
    ids: list[int] = tokenizer(content)["input_ids"]
    if not ids:
        raise DataError(f"{file} has no tokens: give another text with --text")
    wanted = sequences * length
    ids = (ids * -(-wanted // len(ids)))[:wanted]
    return torch.tensor(ids, dtype=torch.int64).view(sequences, length)


def _compare(
    hf_dir: Path, tokens_NS: torch.Tensor, logits_file: Path, *, run: RunConfig, tolerance: float
) -> LogitsReport:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(  # nosec B615 # a directory
        hf_dir,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    largest = farthest = total = 0.0
    agreed = wrong = 0
    margins: list[tuple[torch.Tensor, torch.Tensor]] = []
    with safe_open(logits_file, framework="pt") as found, torch.no_grad():
        for number, tokens_S in enumerate(tokens_NS):
            theirs_SV = model(input_ids=tokens_S[None]).logits[0].float()
            apart_SV = (found.get_tensor(f"logits_{number}").float() - theirs_SV).abs()
            largest = max(largest, float(theirs_SV.abs().max()))
            farthest = _largest(farthest, float(apart_SV.max()))
            total += float(apart_SV.double().mean())
            same_S = found.get_tensor(f"logits_{number}").argmax(-1) == theirs_SV.argmax(-1)
            agreed += int(same_S.sum())
            best_S2 = theirs_SV.topk(2, dim=-1).values
            margins.append((same_S, best_S2[:, 0] - best_S2[:, 1]))
    for same_S, margin_S in margins:
        wrong += int((~same_S & (margin_S > 2 * farthest)).sum())
    layout = run.parallel
    return LogitsReport(
        layout={
            "tp_size": layout.tp_size,
            "pp_size": layout.pp_size,
            "vpp_size": layout.vpp_size,
            "sequence_parallel": layout.sequence_parallel,
        },
        sequences=tokens_NS.shape[0],
        tokens=tokens_NS.shape[1],
        largest_logit=largest,
        max_difference=farthest,
        mean_difference=total / tokens_NS.shape[0],
        tolerance=tolerance,
        top1_agreement=agreed / tokens_NS.numel(),
        top1_wrong=wrong,
    )


def _largest(one: float, other: float) -> float:
    """The larger; a NaN stays."""
    return other if other != other or other > one else one
