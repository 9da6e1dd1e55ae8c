"""The one thread that computes: calls in order, samples that wait together in one batch."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .failures import RequestError
from .futures import Outcome, failure
from .sample_wire import SampleRequest

Resolve = Callable[[Outcome], None]


@dataclass(frozen=True)
class Call:
    """Anything but sampling."""

    run: Callable[[], Outcome]
    resolve: Resolve


@dataclass(frozen=True)
class Sampling:
    """A sample request from one version of the weights."""

    weights: str
    request: SampleRequest
    resolve: Resolve

    def joins(self, other: Sampling) -> bool:
        """Whether both may run in one batch."""
        own, others = self.request.scoring, other.request.scoring
        # Scores cost as much as the most that any request of a batch asks for.
        alike = own.asked == others.asked and own.top == others.top
        return alike and self.weights == other.weights


Work = Call | Sampling
# Runs the first of the given samplings and whichever others fit; returns those that ran.
RunBatch = Callable[[Sequence[Sampling]], Sequence[Sampling]]


class Worker:
    """Owns torch: whatever touches the model runs here, in the order it was asked for.

    Samples overtake: they read weights that never change, so that their order can't matter.
    """

    def __init__(self, run_batch: RunBatch, prepare: Callable[[], None]) -> None:
        self._run_batch, self._prepare = run_batch, prepare
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._broken: Outcome | None = None
        threading.Thread(target=self._work, name="compute", daemon=True).start()

    def submit(self, work: Work) -> None:
        """Queue work."""
        with self._changed:
            self._waiting.append(work)
            self._changed.notify()

    def _work(self) -> None:
        try:
            self._prepare()
        except Exception as error:  # a model that can't be loaded is every request's answer
            traceback.print_exc(file=sys.stderr)
            self._broken = failure(f"the model could not be loaded: {error}")
        while True:
            self._serve(*self._take())

    def _take(self) -> tuple[Work, list[Sampling]]:
        """The oldest work, and if it is a sampling all that may run with it."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting))
            first = self._waiting.popleft()
            if not isinstance(first, Sampling):
                return first, []
            others = [
                work for work in self._waiting if isinstance(work, Sampling) and first.joins(work)
            ]
            return first, [first, *others]

    def _serve(self, first: Work, samplings: list[Sampling]) -> None:
        """The request boundary: whatever goes wrong here is told to the client, not raised."""
        try:
            if self._broken is not None:
                first.resolve(self._broken)
            elif isinstance(first, Call):
                first.resolve(first.run())
            else:
                self._leave(self._run_batch(samplings))
        except RequestError as error:
            first.resolve(failure(str(error)))
        except Exception as error:  # a bug must fail one request, not end the server
            traceback.print_exc(file=sys.stderr)
            first.resolve(failure(f"{type(error).__name__}: {error}", category="server"))

    def _leave(self, ran: Sequence[Sampling]) -> None:
        gone = {id(work) for work in ran}
        with self._changed:
            self._waiting = deque(work for work in self._waiting if id(work) not in gone)
