"""One thread that does a store's slow work in order; nothing is ever raised."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)
Job = Callable[[], None]


class Worker:
    """Runs jobs one after the other. A job must deal with its own failures; what it raises all
    the same is logged.

    Args:
        background: with False there is no thread, and ``submit`` runs the job itself.
    """

    def __init__(self, name: str, *, background: bool = True) -> None:
        self._background = background
        self._name = name
        self._jobs: deque[Job] = deque()
        self._change = threading.Condition()
        self._busy = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Have a job done after those that were submitted before.

        Raises:
            RuntimeError: the worker is closed.
        """
        if self._closed:
            raise RuntimeError(f"worker {self._name} is closed")
        if not self._background:
            _run(job)
            return
        with self._change:
            self._jobs.append(job)
            self._busy += 1
            if self._thread is None:
                # A daemon: an interpreter that exits without close() is not held up.
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._change.notify_all()

    def drain(self) -> None:
        """Wait until every job that was submitted is done."""
        with self._change:
            self._change.wait_for(lambda: self._busy == 0)

    def close(self) -> None:
        """Finish what was submitted and end the thread. Closing twice is fine."""
        self.drain()
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _loop(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            _run(job)
            with self._change:
                self._busy -= 1
                self._change.notify_all()


def _run(job: Job) -> None:
    try:
        job()
    except Exception:
        logger.exception("a background job failed")
