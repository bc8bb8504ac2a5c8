"""A thread that reads parts of files ahead of their use, into the kernel's page cache."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

logger = logging.getLogger(__name__)

FileRange: TypeAlias = tuple[Path, int, int]  # file, first byte, number of bytes
_BLOCK_BYTES = 4 << 20


class Prefetcher:
    """Reads file ranges in the order they were asked for. A hint only: what fails or comes too late is read when it is needed.

    Reads go through `preadv` into one buffer of 4 MiB, so the thread holds no other memory, lets the others run, and survives a
    file that was cut.

    Args:
        max_bytes: bytes that may wait; where more are asked for, the oldest requests are dropped, as their turn has come.

    Attributes:
        bytes_read: read so far.
    """

    def __init__(self, *, max_bytes: int):
        self.bytes_read = 0
        self._max_bytes = max_bytes
        self._waiting: deque[FileRange] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None

    def ask(self, wanted: Iterable[FileRange]) -> None:
        """Queues the ranges, those of this call up to `max_bytes`, and returns at once."""
        with self._changed:
            if self._closed:
                raise ValueError("the prefetcher is closed")
            asked = 0
            for item in wanted:
                asked += item[2]
                if asked > self._max_bytes:
                    break
                self._waiting.append(item)
                self._waiting_bytes += item[2]
            while self._waiting_bytes > self._max_bytes:
                self._waiting_bytes -= self._waiting.popleft()[2]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cache prefetch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Waits until nothing is queued; False where that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self) -> None:
        """Drops what waits and ends the thread."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                path, start, size = self._waiting.popleft()
                self._waiting_bytes -= size
                self._busy = True
            try:
                self._read(path, start, start + size, buffer)
            except OSError as error:
                logger.debug("prefetching %s: %s", path, error)

    def _read(self, path: Path, position: int, end: int, buffer: memoryview) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while position < end and not self._closed:
                count = os.preadv(descriptor, [buffer[: end - position]], position)
                if count == 0:
                    return
                position += count
                self.bytes_read += count
        finally:
            os.close(descriptor)
