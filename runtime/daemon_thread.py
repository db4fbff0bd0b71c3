"""A thread for calls that may never return."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonExecutor(Executor):
    """An executor with one daemon thread.

    Unlike ThreadPoolExecutor, it lets the process end while a call hangs.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call in the thread, after the calls that were submitted before it."""
        future: Future[T] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as error:  # noqa: BLE001  the caller gets it from the future
                    # Others would cancel the caller's task, end the process, or never arrive.
                    harmless = isinstance(error, Exception) and not isinstance(error, CancelledError | StopIteration)
                    future.set_exception(error if harmless else RuntimeError(f"the call raised {error!r}"))

        self._calls.put(call)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the thread after the calls submitted so far. Never waits, because a call may hang: ignores `wait`."""
        self._calls.put(None)

    def _run(self) -> Any:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it refers to its arguments until the next one comes
