"""`train(run)`: what every rank runs, whoever started it (asft train, torchrun, NeMo-Run)."""

from __future__ import annotations

from asft_nemo.config.schema import RunConfig


def train(run: RunConfig) -> None:
    """Fine-tunes as `run` says and leaves run.json, metrics.jsonl, TensorBoard events and checkpoints in `run.run.dir`.

    Called once on every rank, with torchrun's environment (or none, for one rank).

    Raises:
        asft_nemo.errors.UserError: settings, data or checkpoints that do not fit; the sentence names the cure.
    """
    from asft_nemo.cpu import backend

    backend.install()
    from asft_nemo.data import prepare
    from asft_nemo.logs import quiet_upstream
    from asft_nemo.model import read_model_spec
    from asft_nemo.nemo.build import build
    from asft_nemo.run_dir import base_checkpoint, claim_run_dir, hf_dir, resume_from

    quiet_upstream()
    data = prepare(run, tokenizer_dir=hf_dir(run))
    claim_run_dir(run, data_fingerprint=data.fingerprint)
    base_dir = base_checkpoint(run)
    resume = resume_from(run)
    parts = build(
        run,
        spec=read_model_spec(base_dir / "context" / "hf"),
        base_dir=base_dir,
        data=data,
        resuming=resume is not None,
    )
    parts.trainer.fit(parts.model, datamodule=parts.data, ckpt_path=None if resume is None else str(resume))
