"""How often a sampler may be asked: what users allow, and what its refusals teach."""

from collections import deque
from math import sqrt
from statistics import median

_WINDOW = 1.0  # seconds over which refusals are counted; longer for samplers that allow few
_FEWEST = 20  # starts that say something about a rate
# So many refused of so many consecutive starts are no accident; fewer will do at the start, when
# every further one may be refused too.
_TOGETHER, _TOGETHER_EARLY = (8, 16), (6, 8)
# Early on, requests overtake each other on their way: so many refused, and such a share of all.
_MANY_EARLY = (20, 0.12)
_UNHURRIED = 0.005  # a share of refusals that is no reason to change anything
_NOTABLE = 0.03  # a share of refusals that is worth finding out about
_BELOW = 0.98  # of the rate that was accepted
# Raises of the rate: the first one and the largest, before and after it was found to be too high.
_STEPS_BEFORE, _STEPS = (0.05, 0.25), (0.01, 0.15)
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
        self._paused_at = 0.0
        self._good = 0.0  # the latest rate that was used and not refused
        self._pauses = 0  # in a row, without a good window between them
        self._refused: deque[int] = deque(maxlen=4 * _TOGETHER[1])
        self._usual: deque[float] = deque(maxlen=7)
        self._steps = _STEPS_BEFORE
        self._step = self._steps[0]
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
            # What was under way when the limit was hit is refused too, for the same reason.
            until = self._paused_at + self._pause(retry_after)
            self._paused_until = max(self._paused_until, until)
            return
        enough, latest = _TOGETHER if self._usual else _TOGETHER_EARLY
        expected = latest * self._expected()
        together = sum(number - latest < one <= number for one in self._refused)
        hit = together >= min(latest, max(enough, expected + 4 * sqrt(expected)))
        if hit or (not self._usual and self._too_many()):
            self._pauses += 1
            self._paused_at = now
            self._paused_until = now + self._pause(retry_after)

    def _too_many(self) -> bool:
        fewest, share = _MANY_EARLY
        return self._refusals >= max(fewest, share * self._starts)

    def _expected(self) -> float:
        return median(self._usual) if self._usual else 0.0

    def _pause(self, retry_after: float | None) -> float:
        seconds = _PAUSE * 2 ** (self._pauses - 1) if retry_after is None else retry_after
        return min(max(seconds, 0.0), _LONGEST_PAUSE)

    def _resume(self, now: float) -> None:
        assert self._began is not None and self._paused_until is not None
        began, accepted = self._began, self._accepted
        if self.rate is not None:
            self.strained, self._steps = True, _STEPS
            self._usual.append(self._refusals / max(self._starts, 1))
            if accepted < _FEWEST:
                # The pause was too short to say what the limit is: it is part of a longer one.
                began, accepted = self._earlier[0], accepted + self._earlier[1]
        rate = max(accepted, 1) / max(self._paused_until - began, 1e-3)
        if self._pauses == 1:
            rate = max(rate, self._good * _BELOW)  # one step too far, or one slow moment
        self._good = 0.0
        self._set(rate, now)
        self._earlier = (began, accepted)
        self._began, self._accepted = now, 0
        self._paused_until = None
        self._refused.clear()
        self._step = self._steps[0]
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
                if self.rate is not None:
                    self.strained, self._steps = True, _STEPS
                accepted = max(starts - refusals, 1) / length
                self._set(accepted * (_BELOW if self.strained else 1), now)
                self._step = self._steps[0]
            return
        self._pauses = 0
        if self.rate is not None and self._binding:
            self._good = self.rate
            self._set(self.rate * (1 + self._step), now)
            self._step = min(2 * self._step, self._steps[1])

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
