"""How often a sampler may be asked: what users allow, and what its refusals teach."""

from collections import deque
from math import sqrt
from statistics import median

_WINDOW = 1.0  # seconds over which refusals are counted; longer for samplers that allow few
_FEWEST = 20  # starts that say something about a rate
# So many refused of so many consecutive starts are no accident; fewer will do at the start, when
# every further one may be refused too.
_TOGETHER, _TOGETHER_EARLY = (8, 16), (6, 8)
_UNHURRIED = 0.005  # a share of refusals that is no reason to change anything
_NOTABLE = 0.03  # a share of refusals that is worth finding out about
_BELOW = 0.98  # of the rate that was accepted
_STEPS = (0.05, 0.01, 0.15)  # raises of the rate: after a pause, after a refusal, the largest
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds, where the server doesn't say


class Bucket:
    """Lets through so much a second, and at most `burst` at once; times are in seconds."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate, self.burst = rate, burst
        self._level, self._at = burst, now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may pass; one larger than the burst passes into debt."""
        self._fill(now)
        lacking = min(amount, self.burst) - self._level
        return lacking / self.rate if lacking > 1e-9 else 0.0

    def take(self, amount: float, now: float) -> None:
        """Let `amount` pass, now; less than nothing gives back."""
        self._fill(now)
        self._level = min(self._level - amount, self.burst)

    def _fill(self, now: float) -> None:
        self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now


class Pace:
    """Learns from refusals at which rate requests are accepted; no limit before the first.

    Many consecutive refusals are a limit that was hit: nothing starts for as long as the server
    asks, and then as often as requests were accepted until that moment. Fewer are tried: if they
    go on at the rate at which requests were accepted, load is not their cause, and they are what
    is usual here. Otherwise the rate is raised in growing steps, and one step too many takes it
    back. Times are in seconds.
    """

    def __init__(self) -> None:
        self.rate: float | None = None
        self.strained = False  # the rate was too high: set here, and taken back by who acts on it
        self._bucket: Bucket | None = None
        self._paused_until: float | None = None
        self._pauses = 0  # in a row, without a good window between them
        self._refused: deque[int] = deque(maxlen=4 * _TOGETHER[1])
        self._usual: deque[float] = deque(maxlen=7)
        self._step = _STEPS[0]
        self._began: float | None = None
        self._accepted = 0  # starts since then that nobody refused
        self._earlier = (0.0, 0)  # these two, as they were before the last pause
        self._window_began = 0.0
        self._starts = self._refusals = 0
        self._binding = False

    def wait(self, now: float) -> float:
        """Seconds until the next start."""
        if self._paused_until is not None:
            if now < self._paused_until:
                return self._paused_until - now
            self._resume(now)
        self._close_window(now)
        if self._bucket is None:
            return 0.0
        seconds = self._bucket.wait(1, now)
        self._binding = self._binding or seconds > 0
        return seconds

    def start(self, now: float) -> None:
        """Count a start."""
        if self._began is None:
            self._began = self._window_began = now
        self._starts += 1
        self._accepted += 1
        if self._bucket is not None:
            self._bucket.take(1, now)

    def refuse(self, number: int, now: float, retry_after: float | None) -> None:
        """Count a refusal of the start with this `number`."""
        self._refusals += 1
        self._accepted -= 1
        self._refused.append(number)
        if self._paused_until is not None:
            # What was under way when the limit was hit is refused too.
            self._paused_until = max(self._paused_until, now + self._pause(retry_after))
            return
        enough, latest = _TOGETHER if self._usual else _TOGETHER_EARLY
        expected = latest * self._expected()
        together = sum(number - latest < one <= number for one in self._refused)
        if together >= min(latest, max(enough, expected + 4 * sqrt(expected))):
            self._pauses += 1
            self._paused_until = now + self._pause(retry_after)

    def _expected(self) -> float:
        return median(self._usual) if self._usual else 0.0

    def _pause(self, retry_after: float | None) -> float:
        seconds = _PAUSE * 2 ** (self._pauses - 1) if retry_after is None else retry_after
        return min(max(seconds, 0.0), _LONGEST_PAUSE)

    def _resume(self, now: float) -> None:
        assert self._began is not None and self._paused_until is not None
        began, accepted = self._began, self._accepted
        if self.rate is not None:
            self.strained = True
            self._usual.append(self._refusals / max(self._starts, 1))
            if accepted < _FEWEST:
                # The pause was too short to say what the limit is: it is part of a longer one.
                began, accepted = self._earlier[0], accepted + self._earlier[1]
        self._set(max(accepted, 1) / max(self._paused_until - began, 1e-3), now)
        self._earlier = (began, accepted)
        self._began, self._accepted = now, 0
        self._paused_until = None
        self._refused.clear()
        self._step = _STEPS[0]
        self._open_window(now)

    def _close_window(self, now: float) -> None:
        length = now - self._window_began
        if length < _WINDOW or (self._starts < _FEWEST and length < _LONGEST_PAUSE):
            return
        if self._starts:
            self._judge(length, now)
        self._open_window(now)

    def _judge(self, length: float, now: float) -> None:
        """What a window says; the rate goes down at most once in each."""
        starts, refusals = self._starts, self._refusals
        share, expected = refusals / starts, starts * self._expected()
        self._usual.append(share)
        if refusals > expected + 3 * sqrt(expected) + _UNHURRIED * starts:
            if self.rate is not None or share > _NOTABLE:
                self.strained = self.rate is not None
                accepted = max(starts - refusals, 1) / length
                self._set(accepted * (_BELOW if self.strained else 1), now)
                self._step = _STEPS[1]
            return
        self._pauses = 0
        if self.rate is not None and self._binding:
            self._set(self.rate * (1 + self._step), now)
            self._step = min(2 * self._step, _STEPS[2])

    def _open_window(self, now: float) -> None:
        self._window_began = now
        self._starts = self._refusals = 0
        self._binding = False

    def _set(self, rate: float, now: float) -> None:
        self.rate = rate
        if self._bucket is None:
            self._bucket = Bucket(rate, 1, now)
        self._bucket.rate = rate
        # Timers are late by a millisecond or so: a little is made up for at once.
        self._bucket.burst = max(1.0, rate * 0.02)
