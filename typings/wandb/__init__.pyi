"""What the project uses of Weights & Biases; the library's own __init__ leads a type checker to pydantic and all of its apps."""

from collections.abc import Mapping
from typing import Any, Literal

class Settings:
    def __init__(
        self,
        *,
        console: str = ...,
        disable_git: bool = ...,
        disable_code: bool = ...,
        x_disable_meta: bool = ...,
        silent: bool = ...,
        root_dir: str = ...,
    ) -> None: ...

class Run:
    dir: str
    url: str | None
    def define_metric(self, name: str, *, step_metric: str | None = ...) -> object: ...
    def log(self, data: dict[str, Any]) -> None: ...
    def finish(self, *, exit_code: int | None = ...) -> None: ...

def init(
    *,
    project: str | None = ...,
    entity: str | None = ...,
    name: str | None = ...,
    id: str | None = ...,
    resume: bool | Literal["allow", "never", "must", "auto"] | None = ...,
    mode: Literal["online", "offline", "disabled", "shared"] | None = ...,
    config: Mapping[str, Any] | str | None = ...,
    settings: Settings | dict[str, Any] | None = ...,
) -> Run: ...
