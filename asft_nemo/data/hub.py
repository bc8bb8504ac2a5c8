"""Datasets of the Hugging Face hub as files: from the cache of `datasets`, fetched into it where they are not there.

The cache counts first, so that a run reads the same rows tomorrow and no rank asks the network for what another one has. Where ranks of
several machines begin at once, `datasets` itself locks the cache while it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from asft_nemo.config.hub_ids import HubId
from asft_nemo.errors import DataError

_SECONDS = 30  # without an answer


@lru_cache(maxsize=64)
def hub_files(name: str, found: HubId) -> tuple[Path, ...]:
    """The Arrow files of a split, in order.

    Args:
        name: the entry, for messages.
        found: what it names.

    Raises:
        DataError: it is neither in the cache nor can be fetched, or has no such configuration or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} is no file, and reading it from the hub needs the package datasets: install it, or correct data.train"
        ) from error
    with quiet_hub():
        rows = _cached(found)
        if isinstance(rows, str):
            rows = _fetched(name, found, why_not_cached=rows)
    if not isinstance(rows, datasets.Dataset) or not rows.cache_files:
        raise DataError(
            f"{name} is no dataset of rows in files: save it (save_to_disk) and name the directory"
        )
    return tuple(Path(file["filename"]) for file in rows.cache_files)


def _cached(found: HubId) -> Any:
    """The split as `datasets` has it in its cache, the newest where there are several; why not, as text, where it has not."""
    from datasets.packaged_modules.cache.cache import Cache

    settings: dict[str, Any] = {"config_name": found.configuration, "version": "auto", "hash": "auto"}
    try:
        builder = Cache(repo_id=found.repo, dataset_name=found.repo.partition("/")[2], **settings)
        return builder.as_dataset(split=found.split)  # pyright: ignore[reportArgumentType]
    except (ValueError, OSError) as error:  # not there, several configurations, no such split, incomplete
        return " ".join(str(error).split())[:200]


def _fetched(name: str, found: HubId, *, why_not_cached: str) -> Any:
    import datasets
    from datasets import config
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        reach_hub(constants.ENDPOINT)
        # Scripts of datasets are anyone's code: they are not run.
        return datasets.load_dataset(  # nosec B615 # the user names the dataset; the run records the digest of its rows
            found.repo, found.configuration, split=found.split, trust_remote_code=False
        )
    except ConnectionError as error:
        raise DataError(
            f"{name} is no file (looked in {Path.cwd()}), is not in the cache of datasets ({config.HF_DATASETS_CACHE}: {why_not_cached}), and "
            f"the hub cannot be reached ({innermost(error)}): correct data.train, or go online once to fetch it"
        ) from error
    except (DatasetsError, HfHubHTTPError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} is no file (looked in {Path.cwd()}) and cannot be had from the hub: {reason[:300]}: correct data.train, whose form for "
            "the hub is owner/name:configuration:split"
        ) from error


def reach_hub(endpoint: str) -> None:
    """Asks the hub once, for huggingface_hub finds out only after half a minute of retries that there is no network.

    Raises:
        ConnectionError: it does not answer, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled
    from requests import RequestException

    try:
        get_session().head(endpoint, timeout=_SECONDS)
    except OfflineModeIsEnabled as error:
        raise ConnectionError("HF_HUB_OFFLINE is set") from error
    except RequestException as error:
        raise ConnectionError(innermost(error)) from error


def innermost(error: BaseException) -> str:
    """The innermost reason: urllib3 wraps it in those of every layer, and huggingface_hub puts an id behind."""
    words = " ".join(str(error).split()).partition("'(Request ID")[0]
    words = words.rstrip(", ").rsplit(": ", 1)[-1].strip("'\")( ")
    return words[:120] or type(error).__name__


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the remarks of `datasets` about its cache, and of huggingface_hub, which says every retry twice in ten lines."""
    levels = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
