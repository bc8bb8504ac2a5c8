"""What pyproject.toml cannot say: the wheel carries conf/, recipes/ and assets/ as data inside `asft_nemo`.

`asft_nemo.config.paths` finds them there. In an editable installation they stay where they are, beside the package.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

#: `asft_nemo.config.paths.SHIPPED`; the package itself cannot be imported while it is being built
PLACE = Path("asft_nemo", "_project")
SHIPPED = ("conf", "recipes", "assets/tiny-base", "assets/tiny-data", "assets/verify_text.txt")


class BuildWithData(build_py):
    """Modules, and beside them what they read."""

    def run(self) -> None:
        """Builds both; what an earlier build left of the data goes."""
        super().run()
        if self.editable_mode:
            return
        place = Path(self.build_lib) / PLACE
        shutil.rmtree(place, ignore_errors=True)
        for name in SHIPPED:
            source, target = Path(name), place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)


setup(cmdclass={"build_py": BuildWithData})
