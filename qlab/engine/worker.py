"""An engine in a process of its own: several, each with its own environment, live side by side and start at the same time.

vLLM reads environment variables once per process, and two of its engines in one process share kernels and a GPU context; a
process apart takes nothing from the caller. Nothing heavy is imported here, so that variables are set before anything reads
them. Requests and answers are pickled between the two processes of one program, over a pipe that nobody else can open.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import get_context, parent_process
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from qlab import errors
from qlab.errors import QlabError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from qlab.engine.path import Path
    from qlab.engine.run import Advance, Request, Run

FACTS = ("name", "path", "directory", "dtype", "native")
"""Attributes of an engine that its stand-in has too."""
PATIENCE = 10.0
"""Seconds that a process is given to end by itself."""


class Remote:
    """The engine that ``factory(*arguments, **options)`` makes, in a spawned process. Use it as a context, or call close.

    The process starts at once and the constructor does not wait: whoever first asks for an attribute or a run does, and is told
    there why the engine could not be made. Runs of one engine follow each other; different engines may run in threads.

    Args:
        factory: a function or class that a new process can import by name; arguments must be picklable.
        environment: variables set there before anything else is imported; None removes one.
        log: file that takes what the process prints; its own standard output and error otherwise.
        seconds: how long the engine may take to start, and a run may be silent, before it is ended.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        *arguments: Any,
        environment: Mapping[str, str | None] | None = None,
        log: File | None = None,
        seconds: float = 600.0,
        **options: Any,
    ) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        job = pickle.dumps((factory, arguments, options))
        names = (dict(environment or {}), None if log is None else str(log))
        # Not a daemon: an engine may start processes of its own (tensor parallelism), which daemons may not.
        self._process = context.Process(target=_serve, args=(other, *names, job), daemon=False)
        self._process.start()
        other.close()
        self._log, self._seconds = log, seconds
        self._lock = threading.RLock()
        self._facts: dict[str, Any] | None = None
        self._failure: QlabError | None = None
        # multiprocessing waits for such processes when the program ends; exit handlers run in reverse order, so this is first.
        self._end = weakref.finalize(self, _end, self._pipe, self._process)
        atexit.register(self._end)

    def __getattr__(self, name: str) -> Any:
        """The engine's own name, path, directory, dtype and native; waits for its start."""
        if name not in FACTS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        facts = self.wait()._facts or {}
        if name not in facts:
            raise AttributeError(f"the engine has no attribute {name!r}")
        return facts[name]

    if TYPE_CHECKING:  # what __getattr__ gives, for those who want an Engine
        name: str
        path: Path

    def wait(self) -> Remote:
        """Return when the engine is ready. Raises what its constructor raised: QlabError or a subclass, one sentence."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._facts is None:
                try:
                    self._facts = self._answer("starting", lambda tokens: None)
                except QlabError as e:
                    self._failure = e
                    self.close()
                    raise
        return self

    def run(self, request: Request, advance: Advance = lambda tokens: None) -> Run:
        """The engine's answer; its errors come back as QlabError or the subclass that it raised."""
        with self._lock:
            self.wait()
            try:
                self._pipe.send_bytes(pickle.dumps(("run", request)))
            except OSError:
                raise self._lost("running") from None
            return self._answer("running", advance)

    def close(self) -> None:
        """End the process; what it holds on the GPU is free afterwards. Calling it again does nothing."""
        self._end()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, doing: str, advance: Advance) -> Any:
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                if not self._pipe.poll(max(deadline - time.monotonic(), 0)):
                    self._process.terminate()
                    self.close()
                    raise QlabError(f"the engine was silent for {self._seconds:g} s while {doing} and was ended{self._where()}")
                kind, *content = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                raise self._lost(doing) from None
            if kind == "advance":
                advance(content[0])
                deadline = time.monotonic() + self._seconds
            elif kind == "error":
                raise getattr(errors, content[0], QlabError)(content[1])
            elif kind == "failed":
                raise QlabError(f"the engine failed while {doing}: {content[0]}{self._where()}")
            else:
                return content[0]

    def _lost(self, doing: str) -> QlabError:
        if not self._end.alive:
            return QlabError("the engine was closed; make another")
        self._process.join(PATIENCE)
        return QlabError(f"the engine's process ended with status {self._process.exitcode} while {doing}{self._where()}")

    def _where(self) -> str:
        return "" if self._log is None else f"; see {self._log}"


def _end(pipe: Connection, process: Any) -> None:
    with contextlib.suppress(OSError):
        pipe.send_bytes(pickle.dumps(("close",)))
    with contextlib.suppress(OSError):
        pipe.close()
    process.join(PATIENCE)
    if process.is_alive():
        process.terminate()
        process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join(PATIENCE)


def _serve(pipe: Connection, environment: Mapping[str, str | None], log: str | None, job: bytes) -> None:
    """The process: make the engine, then answer until the pipe closes."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    if log is not None:
        _redirect(log)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    engine = _told(pipe, lambda: _make(job))
    if engine is None:
        return
    _send(pipe, ("ready", {f: getattr(engine, f) for f in FACTS if hasattr(engine, f)}))
    while True:
        try:
            kind, *content = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # the caller is gone
            break
        if kind == "close":
            break
        _run(pipe, engine, content[0])
    if close := getattr(engine, "close", None):
        close()


def _follow_parent() -> None:
    """End with the caller, however it ended and whatever the engine is doing: its GPU is free again."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(pipe: Connection, engine: Any, request: Request) -> None:
    made = _told(pipe, lambda: engine.run(request, lambda tokens: _send(pipe, ("advance", tokens))))
    if made is not None:
        _send(pipe, ("run", made))


def _make(job: bytes) -> Any:
    factory, arguments, options = pickle.loads(job)
    return factory(*arguments, **options)


def _told(pipe: Connection, work: Callable[[], Any]) -> Any:
    """What ``work`` gives; None where it failed, and then the caller was told."""
    try:
        return work()
    except QlabError as e:
        _send(pipe, ("error", type(e).__name__, str(e)))
    except Exception as e:
        traceback.print_exc()
        sys.stderr.flush()
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        _send(pipe, ("failed", f"{type(e).__name__}: {lines[0] if lines else 'without a message'}"))
    return None


def _send(pipe: Connection, message: tuple[Any, ...]) -> None:
    # Plain pickles carry tensors by value; multiprocessing's own would share memory that ends with this process.
    with contextlib.suppress(OSError):
        pipe.send_bytes(pickle.dumps(message))


def _redirect(log: str) -> None:
    File(log).parent.mkdir(parents=True, exist_ok=True)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.close(out)
