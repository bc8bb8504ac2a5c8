"""asft import, export, verify and inspect."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from asft_nemo.commands.output import DONE, MENDABLE, Add, answer, progress_of
from asft_nemo.errors import UserError


def add_checkpoints(add: Add) -> None:
    """Adds the commands."""
    dtypes = ("fp32", "bf16", "fp16")
    importer = add("import", _import, "Hugging Face directory to NeMo checkpoint")
    importer.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    importer.add_argument("out_dir", type=Path, metavar="OUT")
    importer.add_argument(
        "--dtype", choices=dtypes, help="of the written weights; without it they keep theirs"
    )
    importer.add_argument(
        "--once",
        action="store_true",
        help="OUT may be there already, if it was made from what HF_DIR holds: then nothing is done",
    )
    exporter = add("export", _export, "NeMo checkpoint to Hugging Face directory")
    exporter.add_argument("ckpt_dir", type=Path, metavar="CKPT")
    exporter.add_argument("out_dir", type=Path, metavar="OUT_HF_DIR")
    exporter.add_argument(
        "--dtype", choices=dtypes, help="of the written weights; without it the base model's"
    )
    exporter.add_argument(
        "--base",
        type=Path,
        help="the base's directory: for config and tokenizer where the checkpoint has none, and for the weights with --adapters merge",
    )
    exporter.add_argument(
        "--max-shard-size",
        type=_size,
        help="largest safetensors file, for example 5GB or 500MB (default: 5GB)",
    )
    exporter.add_argument(
        "--adapters",
        choices=("merge", "peft"),
        help="of a LoRA checkpoint: merged into the base's weights (fp32, then cast), or as a directory that PEFT loads",
    )
    verifier = add(
        "verify", _verify, "compare a NeMo checkpoint with a Hugging Face directory: every bit, then logits"
    )
    verifier.add_argument("ckpt_dir", type=Path, metavar="CKPT")
    verifier.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    verifier.add_argument(
        "layout",
        nargs="*",
        metavar="parallel.KEY=VALUE",
        help="layout of the Megatron model whose logits are compared",
    )
    verifier.add_argument(
        "--weights-only",
        action="store_true",
        help="compare the bits alone: no model is built, memory stays small",
    )
    verifier.add_argument(
        "--text", type=Path, help="text the logits are compared on; without it a shipped one"
    )
    verifier.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of logits, as a share of the largest logit (default: %(default)s)",
    )
    verifier.add_argument(
        "--out", type=Path, default=Path("runs/verify"), help="folder of report.json (default: %(default)s)"
    )
    inspector = add("inspect", _inspect, "what a checkpoint holds, without reading its tensors")
    inspector.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="a checkpoint, a run's folder, a Hugging Face or PEFT directory",
    )


def _import(arguments: argparse.Namespace) -> int:
    if arguments.once and arguments.out_dir.is_dir():
        return _imported_before(arguments)
    from asft_nemo.checkpoint.convert import import_hf

    with progress_of("import") as progress:
        report = import_hf(arguments.hf_dir, arguments.out_dir, dtype=arguments.dtype, progress=progress)
    answer(
        arguments,
        _conversion(report),
        f"imported {report.num_tensors} tensors ({report.nbytes} bytes) to {report.path}",
    )
    return DONE


def _imported_before(arguments: argparse.Namespace) -> int:
    from asft_nemo.config.run_folder import other_base

    if arguments.dtype is not None:
        raise UserError(
            f"--dtype does nothing with --once where {arguments.out_dir} is there already: leave one out"
        )
    problem = other_base(arguments.out_dir, arguments.hf_dir)
    if problem is not None:
        raise UserError(problem)
    answer(arguments, {"path": str(arguments.out_dir)}, f"{arguments.out_dir} is there already")
    return DONE


def _size(text: str) -> int:
    """Bytes from a number with a unit, in powers of ten as Hugging Face counts."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "": 1}
    number = text.upper().rstrip("GMKB")
    unit = units.get(text.upper().removeprefix(number))
    try:
        size = round(float(number) * (unit or 0))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no size: write for example 5GB, 500MB or a number of bytes"
        )
    return size


def _export(arguments: argparse.Namespace) -> int:
    options: dict[str, Any] = {"dtype": arguments.dtype, "base_dir": arguments.base}
    if arguments.max_shard_size is not None:
        if arguments.adapters == "peft":
            raise UserError(
                "--max-shard-size does nothing with --adapters peft, which writes one file: leave it out"
            )
        options["max_shard_bytes"] = arguments.max_shard_size
    if arguments.adapters == "merge":
        from asft_nemo.checkpoint.lora_merge import export_merged as export
    elif arguments.adapters == "peft":
        from asft_nemo.checkpoint.lora_peft import export_peft as export
    else:
        from asft_nemo.checkpoint.convert import export_hf as export
    with progress_of("export") as progress:
        report = export(arguments.ckpt_dir, arguments.out_dir, progress=progress, **options)
    done = {"merge": "merged", "peft": "wrote adapters of"}.get(arguments.adapters, "exported")
    answer(
        arguments,
        _conversion(report),
        f"{done} {report.num_tensors} tensors ({report.nbytes} bytes) to {report.path}",
    )
    return DONE


def _conversion(report: Any) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "family": report.family,
        "num_tensors": report.num_tensors,
        "bytes": report.nbytes,
        "dtype": str(report.dtype).removeprefix("torch."),
        "seconds": report.seconds,
    }


def _verify(arguments: argparse.Namespace) -> int:
    from asft_nemo.checkpoint.verify import verify
    from asft_nemo.run_dir import write_json

    _check_verify(arguments)
    logits_check = None
    if not arguments.weights_only:
        from asft_nemo.logits_check import LogitsCheck

        logits_check = LogitsCheck(
            arguments.ckpt_dir,
            arguments.hf_dir,
            overrides=arguments.layout,
            text=arguments.text,
            tolerance=arguments.tolerance,
        )
    with progress_of("verify") as progress:
        report = verify(arguments.ckpt_dir, arguments.hf_dir, progress=progress)
    differences = [
        {"name": row.name, "numbers": row.numbers, "total": row.total, "max_difference": row.max_difference}
        for row in report.differences
    ]
    verdict = "identical" if report.identical else "DIFFERENT"
    lines = [
        f"weights {verdict}: {report.num_tensors} tensors, {report.nbytes} bytes, {len(differences)} differ"
    ]
    lines += [
        f"  {row['name']}: {row['numbers']} of {row['total']} numbers differ, at most by {row['max_difference']:g}"
        for row in differences
    ]
    values: dict[str, Any] = {
        "checkpoint": str(arguments.ckpt_dir),
        "hf_dir": str(arguments.hf_dir),
        "identical": report.identical,
        "num_tensors": report.num_tensors,
        "differences": differences,
        "logits": None,
    }
    passed = report.identical
    if logits_check is not None:
        logits = logits_check.run()
        values["logits"], passed = logits.to_json(), passed and logits.equal
        lines.append(
            f"logits {'agree' if logits.equal else 'DISAGREE'}: {logits.sequences} x {logits.tokens} tokens, at most {logits.max_difference:.1e} "
            f"and on average {logits.mean_difference:.1e} apart (the largest is {logits.largest_logit:.1f}), same first choice at "
            f"{100 * logits.top1_agreement:.2f} % of the positions"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "report.json", {"passed": passed, **values})
    lines.append(f"report: {arguments.out / 'report.json'}")
    answer(arguments, values, "\n".join(lines))
    return DONE if passed else MENDABLE


def _check_verify(arguments: argparse.Namespace) -> None:
    """What would be ignored or fail late."""
    idle = [name for name, given in (("a layout", arguments.layout), ("--text", arguments.text)) if given]
    if arguments.weights_only and idle:
        raise UserError(f"{idle[0]} does nothing with --weights-only: leave one of them out")
    if not 0 <= arguments.tolerance < 1:
        raise UserError(
            f"--tolerance={arguments.tolerance} is out of range: give a share of the largest logit, from 0 to below 1"
        )
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out={arguments.out} is a file: give a folder")


def _inspect(arguments: argparse.Namespace) -> int:
    from asft_nemo.checkpoint.inspection import inspect

    found = inspect(arguments.path)
    values = found.to_json()
    kinds = ", ".join(f"{name} {numbers}" for name, numbers in found.dtypes.items())
    lines = [
        f"{found.path}: {found.kind}, {found.num_tensors} tensors, {found.parameters} numbers ({kinds}), {found.nbytes} bytes"
    ]
    if found.spec is not None:
        tied = "tied" if found.spec.tie_word_embeddings else "untied"
        lines.append(
            f"{found.spec.family}: {found.spec.num_layers} layers, hidden size {found.spec.hidden_size}, vocabulary {found.spec.vocab_size}, {tied}"
        )
    if found.adapters is not None:
        given = found.adapters
        lines.append(f"adapters: rank {given.rank}, alpha {given.alpha:g}, on {', '.join(given.targets)}")
    if found.kind.startswith("nemo"):
        lines.append(
            f"optimizer state: {found.optimizer_tensors} tensors"
            if found.optimizer_tensors
            else "no optimizer state"
        )
    if found.run is not None:
        run, layout = found.run, found.run["parallel"]
        lines.append(
            f"step {run['step']} of {run['objective']} (kl_weight {run['kl_weight']:g}) from {run['model']}, {run['precision']}, on "
            f"{run['world_size']} ranks: TP {layout['tp_size']}, PP {layout['pp_size']}, VPP {layout['vpp_size'] or 1}"
        )
    answer(arguments, values, "\n".join(lines))
    return DONE
