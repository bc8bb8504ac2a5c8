"""What the project uses of NeMo-Run 0.11.

The library's own __init__ leads a type checker to torchx, fiddle, rich and networkx: an eighth of all that it reads.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

class _Built(Generic[_T]):
    def __init__(self, fn_or_cls: Callable[..., _T], *args: Any, **kwargs: Any) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...

class Config(_Built[_T]): ...
class Partial(_Built[_T]): ...

class Script:
    def __init__(self, path: str = ..., inline: str = ...) -> None: ...

class Packager:
    def __init__(self) -> None: ...

class LocalTunnel:
    def __init__(self, job_dir: str) -> None: ...

class LocalExecutor:
    def __init__(self) -> None: ...

class SlurmExecutor:
    def __init__(
        self,
        *,
        account: str,
        partition: str | None = ...,
        qos: str | None = ...,
        constraint: str | None = ...,
        time: str = ...,
        nodes: int = ...,
        ntasks_per_node: int = ...,
        gpus_per_node: int | None = ...,
        cpus_per_task: int | None = ...,
        mem: str | None = ...,
        exclusive: bool | str | None = ...,
        signal: str | None = ...,
        container_image: str | None = ...,
        container_mounts: list[str] = ...,
        srun_args: list[str] | None = ...,
        additional_parameters: dict[str, Any] | None = ...,
        job_name_prefix: str = ...,
        setup_lines: str | None = ...,
        packager: Packager = ...,
        tunnel: LocalTunnel = ...,
        poll_estimated_start_time: bool = ...,
    ) -> None: ...

class Experiment:
    def __init__(
        self,
        title: str,
        *,
        id: str | None = ...,
        base_dir: str | None = ...,
        clean_mode: bool = ...,
        enable_goodbye_message: bool | None = ...,
        skip_status_at_exit: bool = ...,
        serialize_metadata_for_scripts: bool = ...,
        threadpool_workers: int = ...,
        log_level: str = ...,
    ) -> None: ...
    def __enter__(self) -> Experiment: ...
    def __exit__(self, *error: object) -> None: ...
    def add(
        self,
        task: Script | Partial[Any],
        *,
        executor: SlurmExecutor | LocalExecutor,
        name: str,
        dependencies: Sequence[str] = ...,
    ) -> str: ...
