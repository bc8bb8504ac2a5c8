"""Where the files that belong to the project but not to a Python package lie: conf/, recipes/, assets/; and what the hub's tools keep."""

from __future__ import annotations

import os
from pathlib import Path

import asft_nemo

SHIPPED = "_project"  # the wheel carries conf/, recipes/ and assets/ as data under asft_nemo/_project/


def project_dir() -> Path:
    """The folder that holds conf/, recipes/ and assets/: inside the installed package, else the clone's root.

    Raises:
        FileNotFoundError: neither place has them, so the installation is broken.
    """
    package = Path(asft_nemo.__file__).resolve().parent
    for root in (package / SHIPPED, package.parent):
        if (root / "conf" / "config.yaml").is_file():
            return root
    raise FileNotFoundError(
        f"no conf/config.yaml under {package / SHIPPED} or {package.parent}: reinstall asft-nemo"
    )


def hub_home(given: str | None) -> Path | None:
    """The folder of Hugging Face's tools, by their own rule.

    Args:
        given: the value of HF_HOME, where it is set; HF_HUB_CACHE is read by the same rule.

    Returns:
        None where nothing is set and the user has no home, as in a container that does not know the user.
    """
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    place = os.path.expanduser(os.path.expandvars(given or default))
    return None if place.startswith("~") else Path(place)
