"""The engine in a thread of its own: requests go in, tokens come out."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from mistral_ms.inference import Engine
from mistral_ms.inference.sampling import Alternative
from mistral_ms.inference.scheduler import Scheduler
from mistral_ms.inference.sequence import FinishReason, RunningSequence

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """One more token of a sequence, or its end by an error.

    Attributes:
        text: the text that has become certain.
        token_id: the token; None with an error.
        logprob: its log-probability.
        top: the most likely tokens in its place, where they were asked for.
        finish_reason: of the last one; None before.
        error: what went wrong.
    """

    text: str
    token_id: int | None
    logprob: float = 0.0
    top: tuple[Alternative, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


OnToken = Callable[[Token], None]


class EngineRunner:
    """Runs an engine's scheduler as long as there is something to do, and waits otherwise.

    Args:
        engine: nobody else may use it meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        shapes = engine.steps.fixed_shapes(engine.chunk)
        self._shapes = {engine.steps.one, *shapes}
        self._scheduler = Scheduler(engine.steps, shapes, engine.model.clear_cache)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, OnToken] = {}
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compiles the graphs; returns when requests can be taken.

        Raises:
            BaseException: what compiling raised.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends the thread after the step that it computes; sequences stay where they are."""
        self._calls.put(None)
        self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether a step could not be computed: then no other one will be."""
        return self._failure is not None

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that have none yet."""
        return self._scheduler.waiting

    def submit(self, sequence: RunningSequence, on_token: OnToken) -> None:
        """Puts a sequence into the queue; from now on only the engine's thread may look into it.

        Args:
            sequence: of :meth:`~mistral_ms.inference.Engine.sequence`.
            on_token: called with each token, in the engine's thread.
        """

        def add() -> None:
            if self._failure is not None:
                on_token(Token("", None, finish_reason="error", error=str(self._failure)))
                return
            self._listeners[id(sequence)] = on_token
            self._scheduler.add(sequence)

        self._calls.put(add)

    def cancel(self, sequence: RunningSequence) -> None:
        """Ends a sequence; its slot is free from the next step on. No token comes afterwards but
        those of the step that is computed now.
        """

        def remove() -> None:
            self._scheduler.cancel(sequence)
            self._listeners.pop(id(sequence), None)

        self._calls.put(remove)

    def _run(self) -> None:
        try:
            self.engine.steps.compile(self._shapes)
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        while self._take_calls():
            try:
                found = self._scheduler.step()
            except Exception as error:
                _log.exception("a step failed: no further request is answered")
                self._fail(error)
                continue
            for progress in found:
                self._tell(progress.sequence, progress.text)

    def _take_calls(self) -> bool:
        """Does what was asked; waits for something while there is nothing to compute.

        Returns:
            False at the end.
        """
        while True:
            try:
                call = self._calls.get(block=not self._scheduler.busy)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()

    def _tell(self, sequence: RunningSequence, text: str) -> None:
        reason = sequence.finish_reason
        if sequence.error is not None:
            error = self.engine.explained(sequence.error)
            token = Token(text, None, finish_reason=reason, error=str(error))
        else:
            top = sequence.top_logprobs[-1] if sequence.top_logprobs else ()
            token = Token(text, sequence.new_ids[-1], sequence.logprobs[-1], top, reason)
        listener = (
            self._listeners.get(id(sequence))
            if reason is None
            else self._listeners.pop(id(sequence), None)
        )
        if listener is not None:
            listener(token)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        listeners, self._listeners = self._listeners, {}
        self._scheduler = Scheduler(self.engine.steps, (), self.engine.model.clear_cache)
        for on_token in listeners.values():
            on_token(Token("", None, finish_reason="error", error=str(error)))
