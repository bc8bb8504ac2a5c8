"""A run at Weights & Biases: the same numbers as metrics.jsonl, online where there is a key, else in a folder to send later.

Lightning's WandbLogger logs on global rank 0, which does not know the loss where there are pipeline stages, and knows no resumed run; so
wandb is called here, on the one rank that writes metrics.jsonl.
"""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from asft_nemo.config.schema import RunConfig, to_dict
from asft_nemo.run_dir import git_commit, versions

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id"
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def shared_settings(run: RunConfig) -> dict[str, Any]:
    """The settings without what may hold a secret: of `cluster`, only where the run is."""
    settings = to_dict(run)
    kept = ("name", "executor", "nodes", "gpus_per_node")
    settings["cluster"] = {key: settings["cluster"][key] for key in kept}
    return {**settings, "versions": versions(), "git_commit": git_commit()}


def mode() -> str:
    """What WANDB_MODE says; without it ``online`` where wandb would find a key without asking for one, else ``offline``."""
    given = os.environ.get("WANDB_MODE")
    if given:
        return given
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    return "online" if any(os.environ.get(key) for key in _KEYS) or _in_netrc(host) else "offline"


def _in_netrc(host: str) -> bool:
    """Whether `wandb login` left a key for this host."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(folder: Path) -> str:
    """The run's id at W&B, made once: a run that is resumed goes on under it."""
    file = folder / ID_FILE
    if not file.is_file():
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()


class WandbRun:
    """One run, on the rank that writes. What wandb cannot do never ends the training: it is said once, and logging to it ends.

    Args:
        run: the settings; `trainer.wandb` is given.
    """

    def __init__(self, run: RunConfig):
        self._run = run
        self._open: Any = None

    def start(self) -> None:
        """Begins, or goes on with, the run at W&B."""
        try:
            self._open = self._init(mode())
        except Exception as error:
            self._give_up("could not be started", error)

    def _init(self, chosen: str) -> Any:
        import wandb

        folder = Path(self._run.run.dir).resolve()
        *entity, project = str(self._run.trainer.wandb).split("/")
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # would send the command line
            silent=True,
            root_dir=str(folder),
        )
        opened = wandb.init(
            project=project,
            entity=entity[0] if entity else None,
            name=folder.name,
            id=run_id(folder),
            resume="allow",
            mode=chosen,  # type: ignore[arg-type]
            config=shared_settings(self._run),
            settings=settings,
        )
        opened.define_metric(
            "*", step_metric="step"
        )  # steps that are run again after a resume are logged again
        if chosen == "offline":
            logger.info(
                "W&B: offline (no key, or WANDB_MODE); send it later with: wandb sync %s",
                Path(opened.dir).parent,
            )
        elif chosen != "disabled":
            logger.info("W&B: %s", opened.url)
        return opened

    def log(self, line: Mapping[str, float]) -> None:
        """Adds a step's numbers."""
        if self._open is None:
            return
        try:
            self._open.log(dict(line))
        except Exception as error:
            self._give_up("stopped", error)

    def finish(self, *, failed: bool) -> None:
        """Ends the run there."""
        if self._open is None:
            return
        try:
            self._open.finish(exit_code=1 if failed else 0)
        except Exception as error:
            self._give_up("did not end cleanly", error)
        self._open = None

    def _give_up(self, what: str, error: Exception) -> None:
        """Whatever it is: pictures on a server are not worth a training run."""
        self._open = None
        logger.warning("W&B %s, the run goes on without it: %s", what, error)
