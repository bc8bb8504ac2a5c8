from typing import Any

class Cache:
    def __init__(
        self, *, repo_id: str, dataset_name: str, config_name: str | None, version: str, hash: str
    ) -> None: ...
    def as_dataset(self, split: str | None = ...) -> Any: ...
