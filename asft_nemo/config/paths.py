"""Where the files that belong to the project but not to a Python package lie: conf/, recipes/, assets/."""

from __future__ import annotations

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
