"""asft demo, train and cache-reference."""

from __future__ import annotations

import argparse
from pathlib import Path

from asft_nemo import slurm_ranks
from asft_nemo.commands.output import DONE, Add, answer
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import UserError


def add_training(add: Add) -> None:
    """Adds the commands."""
    demo = add("demo", _demo, "the whole story on this machine, ends with a report")
    demo.add_argument("--quick", action="store_true", help="two objectives, few steps, under 3 minutes")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the report (default: %(default)s)"
    )
    train = add("train", _train, "fine-tune on this machine; the ranks are started for you")
    train.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example objective=asft"
    )
    _add_settings(train)
    cache = add("cache-reference", _cache_reference, "store the base's hidden states for reference=cached")
    cache.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings of the training run that will read them"
    )
    _add_settings(cache)
    cache.add_argument(
        "--repair", action="store_true", help="check every stored row first and compute again what is damaged"
    )


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="composed settings instead of conf/ and recipes/: launch/settings.json or run.json of a run; KEY=VALUE change single ones",
    )


def _run_of(arguments: argparse.Namespace, *choices: str) -> RunConfig:
    """The settings that a command line gives.

    Args:
        arguments: the command's.
        choices: further words, for settings that are not composed yet.
    """
    from asft_nemo.config.load import compose
    from asft_nemo.config.settings_file import compose_file

    if arguments.settings is not None:
        return compose_file(arguments.settings, arguments.overrides)
    return compose([*arguments.overrides, *choices])


def _demo(arguments: argparse.Namespace) -> int:
    from asft_nemo.demo import run as demo

    demo.main(quick=arguments.quick, out_dir=arguments.out)
    report = arguments.out / "report.html"
    answer(arguments, {"report": str(report)}, f"report: {report}")
    return DONE


def _train(arguments: argparse.Namespace) -> int:
    run = _run_of(arguments)
    _refuse_cluster(run, "train")
    if slurm_ranks.here():
        slurm_ranks.run_rank(run, "train")
    from asft_nemo.launch_local import launch

    launch(run)
    folder = Path(run.run.dir)
    latest = folder / "checkpoints" / "latest"
    answer(
        arguments,
        {"run_dir": str(folder), "checkpoint": str(latest.resolve())},
        f"done: metrics in {folder / 'metrics.jsonl'}\nto export: asft export {latest} OUT_HF_DIR",
    )
    return DONE


def _refuse_cluster(run: RunConfig, command: str) -> None:
    if run.cluster.executor != "local":
        raise UserError(
            f"asft {command} starts ranks on this machine and does nothing with cluster={run.cluster.name}: leave it out, or call asft launch"
        )


def _cache_reference(arguments: argparse.Namespace) -> int:
    run = _run_of(arguments, "reference=cached")
    _refuse_cluster(run, "cache-reference")
    if run.reference.form != "cached":
        raise UserError(
            f"{arguments.settings} has reference.form={run.reference.form}, which reads no cache: launch with reference=cached, or leave --settings out"
        )
    if slurm_ranks.here():
        slurm_ranks.run_rank(run, "repair" if arguments.repair else "cache")
    from asft_nemo.launch_local import launch_cache
    from asft_nemo.run_dir import cache_dir

    launch_cache(run, repair=arguments.repair)
    folder = cache_dir(run)
    answer(
        arguments,
        {"cache_dir": str(folder)},
        f"done: hidden states in {folder}\nto train with it: asft train reference=cached reference.cache_dir={folder} and the same settings",
    )
    return DONE
