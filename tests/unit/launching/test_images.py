"""How pyxis is told of an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from asft_nemo.config.mounts import image


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvcr.io/nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11"),
        ("localhost:5000/team/asft:1", "localhost:5000#team/asft:1"),
        ("localhost/asft", "localhost#asft"),
        ("registry:5000/asft", "registry:5000#asft"),
        ("me@registry.example.com/team/asft:1", "me@registry.example.com#team/asft:1"),
        ("nvcr.io#nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11"),
        ("docker://nvcr.io/nvidia/nemo:25.11", "docker://nvcr.io/nvidia/nemo:25.11"),
        ("team/asft:1", "team/asft:1"),
        ("ubuntu:24.04", "ubuntu:24.04"),
        ("/shared/asft.sqsh", "/shared/asft.sqsh"),
        ("./asft.sqsh", "/home/me/asft.sqsh"),
        ("../asft", "/home/asft"),
        ("asft.sqsh", "/home/me/asft.sqsh"),
        ("images/asft.sqsh", "/home/me/images/asft.sqsh"),
        (None, None),
    ],
)
def test_files_are_absolute_and_hosts_are_marked(name: str | None, expected: str | None) -> None:
    assert image(name, Path("/home/me")) == expected
