"""Work off the event loop that can be stopped: by the button, by a client's cancel, by a closed tab.

All heavy events share one queue with one worker (QUEUE). An event's coroutine ends only when its thread has ended, so
that the worker is free exactly when nothing runs any more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from .core import ready

log = logging.getLogger(__name__)

QUEUE: dict[str, Any] = {"concurrency_id": "work", "concurrency_limit": 1}
WAITING = 24
"""Calls that may wait; more are turned away in words by Gradio."""

T = TypeVar("T")


class Job:
    """One call: how it tells of its progress and learns that nobody wants it any more."""

    def __init__(self, session: str, progress: gr.Progress | None = None):
        self.session = session
        self._progress = progress
        self._stopped = threading.Event()
        self._told = 0.0
        self.doing = "Working"

    def stop(self) -> None:
        self._stopped.set()

    def should_stop(self) -> bool:
        return self._stopped.is_set()

    def check(self) -> None:
        """Raises Cancelled when the job was stopped."""
        if self.should_stop():
            from uplift_core.errors import Cancelled

            raise Cancelled("stopped on request")

    def say(self, doing: str, share: float = 0.0) -> None:
        """What is being done, and how much of it is (0 to 1)."""
        self.check()
        self.doing = doing
        if self._progress is not None:
            self._progress(share, desc=doing)

    def report(self, done: float, total: float) -> None:
        """A core's progress callback: ``(done, total)`` of whatever it counts."""
        self.check()
        now = time.monotonic()
        if self._progress is not None and total and (now - self._told > 0.1 or done >= total):
            self._told = now
            self._progress(min(1.0, done / total), desc=self.doing)


class Jobs:
    """The jobs that run or have their thread still ending, by session."""

    def __init__(self) -> None:
        self._running: dict[str, set[Job]] = defaultdict(set)
        self._lock = threading.Lock()

    async def run(self, work: Callable[[Job], T], request: gr.Request | None,
                  progress: gr.Progress | None = None) -> T:
        """``work(job)`` in a thread. Errors made for people are shown to them; others go to the log."""
        job = Job(getattr(request, "session_hash", None) or "", progress)
        with self._lock:
            self._running[job.session].add(job)
        thread = asyncio.create_task(asyncio.to_thread(_shown, work, job))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            job.stop()
            while not thread.done():
                try:
                    await asyncio.wait([thread])
                except asyncio.CancelledError:
                    continue
            thread.exception()  # it was seen
            raise
        finally:
            with self._lock:
                self._running[job.session].discard(job)
                if not self._running[job.session]:
                    del self._running[job.session]

    def stop(self, request: gr.Request) -> None:
        """Stop all that the browser tab behind the request has running."""
        with self._lock:
            for job in self._running.get(request.session_hash or "", ()):
                job.stop()


def _shown(work: Callable[[Job], T], job: Job) -> T:
    ready()
    from uplift_core.errors import Cancelled, UpliftError

    try:
        return work(job)
    except gr.Error:
        raise
    except Cancelled:
        raise gr.Error("Stopped.", title="Stopped", print_exception=False, duration=3) from None
    except UpliftError as error:
        raise problem(str(error)) from error
    except Exception as error:
        log.exception("unexpected error")
        raise problem(f"Something went wrong that should not ({type(error).__name__}); the log has the details."
                      ) from error


def problem(text: str) -> gr.Error:
    """An error in words, for the person at the page."""
    if text.split(" ", 1)[0].isalpha():  # and not a file's name
        text = text[:1].upper() + text[1:]
    return gr.Error(text, title="That did not work", print_exception=False, duration=15)
