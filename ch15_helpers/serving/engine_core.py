"""How an engine's steps follow one another: one after the other, or the next one launched ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ch15_helpers.serving.faults import device_is_lost
from ch15_helpers.serving.offload import Offload
from ch15_helpers.serving.request import Request
from ch15_helpers.serving.runner import Launched, ModelRunner
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.step import Step


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it ran: what ``on_step`` gets.

    ``schedule_s`` and ``update_s`` are the scheduler's share; the rest of ``end_s - start_s`` is
    block copies, inputs, forward and sampling. ``has_work``: requests are left after it. A step
    that was launched while the one before it ran starts where that one ended, so its
    ``schedule_s`` is hidden behind that one and not a part of its time.
    """

    index: int
    start_s: float
    end_s: float
    schedule_s: float
    update_s: float
    step: Step
    num_tokens: int
    num_waiting: int
    num_free_blocks: int
    has_work: bool


@dataclass(slots=True)
class InFlight:
    """A step that is launched and whose tokens are not collected.

    Attributes:
        launched: where its tokens will be; None for a step that computes nothing.
        error: why it could not be launched.
        start_s: when it was scheduled; later, when the step before it ended.
    """

    step: Step
    launched: Launched | None
    error: Exception | None
    start_s: float
    schedule_s: float

    def tokens(self) -> list[int]:
        """Wait for the tokens.

        Raises:
            Exception: whatever the launch or the device failed with.
        """
        if self.error is not None:
            raise self.error
        return [] if self.launched is None else self.launched.tokens()


class EngineCore:
    """Runs steps; ``Engine`` sets the parts and adds what callers use."""

    scheduler: Scheduler
    runner: ModelRunner
    offload: Offload | None
    clock: Callable[[], float]
    on_step: Callable[[StepRecord], None] | None
    num_steps: int
    lost: str | None
    _overlaps: bool
    _ended: list[Request]
    _in_flight: InFlight | None

    def _step(self) -> list[Request]:
        before, self._ended = self._ended, []
        try:
            ended = self._next_step()
        except BaseException:
            self._ended = before + self._ended
            raise
        return before + ended

    def _next_step(self) -> list[Request]:
        if self.offload is not None:
            self.offload.deliver()
        if not self.scheduler.has_work:
            self._in_flight = None  # all of it was aborted
            return []
        if self._overlaps and self.offload is None:
            return self._overlapped_step()
        return self._whole_step()

    def _whole_step(self) -> list[Request]:
        start_s = self.clock()
        step = self.scheduler.schedule(start_s)
        scheduled_s = self.clock()
        try:
            token_ids = self.runner.run(step)
        except Exception as error:
            return self._fail(step, error)
        except BaseException:
            self._ended += self._give_up(step, "interrupted")
            raise
        ran_s = self.clock()
        ended = self.scheduler.update(step, token_ids, ran_s)
        self._report(step, start_s, ran_s, scheduled_s - start_s)
        if step.is_empty and not ended and self.offload is not None:
            self.offload.wait()
        return ended

    # ---- one step ahead --------------------------------------------------------------------

    def _overlapped_step(self) -> list[Request]:
        """Complete the step in flight, having launched the next one first where that may be."""
        current = self._in_flight or self._launch()
        self._in_flight = following = None
        try:
            self.scheduler.advance(current.step)
            if current.error is None and self.scheduler.can_run_ahead():
                following = self._launch()
            ended, end_s = self._complete(current)
        except BaseException:
            for each in (current, following):
                if each is not None:
                    self._ended += self._give_up(each.step, "interrupted")
            raise
        if following is not None:
            following.start_s = self.clock() if end_s is None else end_s
            ended += self._accept(following)
        if end_s is not None:
            self._report(current.step, current.start_s, end_s, current.schedule_s)
        return ended

    def _launch(self) -> InFlight:
        start_s = self.clock()
        step = self.scheduler.schedule(start_s)
        schedule_s = self.clock() - start_s
        try:
            launched = self.runner.launch(step)
        except Exception as error:
            return InFlight(step, None, error, start_s, schedule_s)
        except BaseException:
            self._ended += self._give_up(step, "interrupted")
            raise
        return InFlight(step, launched, None, start_s, schedule_s)

    def _complete(self, current: InFlight) -> tuple[list[Request], float | None]:
        """Wait for a step; returns the requests that ended, and when it did (None: it failed)."""
        try:
            token_ids = current.tokens()
        except Exception as error:
            return self._fail(current.step, error), None
        end_s = self.clock()
        return self.scheduler.resolve(current.step, token_ids, end_s), end_s

    def _accept(self, following: InFlight) -> list[Request]:
        """Keep the launched step in flight, unless nothing of it is wanted; returns who ended."""
        if following.error is not None:
            return self._fail(following.step, following.error)
        if all(request.is_finished for request in following.step.requests):
            return following.step.failed
        self._in_flight = following
        return []

    def _settle(self) -> list[Request]:
        """Complete the step in flight and launch none; returns the requests that ended."""
        current, self._in_flight = self._in_flight, None
        if current is None:
            return []
        self.scheduler.advance(current.step)
        ended, end_s = self._complete(current)
        if end_s is not None:
            self._report(current.step, current.start_s, end_s, current.schedule_s)
        return ended

    # ---- failures --------------------------------------------------------------------------

    def _fail(self, step: Step, error: Exception) -> list[Request]:
        """The scheduler's state is sound, the device's may not be.

        Only this step's requests depend on it, unless the whole device is gone.
        """
        text = f"the model step failed: {type(error).__name__}: {error}"
        if not device_is_lost(error, self.runner.cache.device):
            return self._give_up(step, text)
        self.lost = text
        self._in_flight = None
        if self.offload is not None:
            self.offload.forget()
        return step.failed + self.scheduler.fail_all(f"the device is lost: {text}")

    def _give_up(self, step: Step, error: str) -> list[Request]:
        finished = self.scheduler.fail(step, error)
        if self.offload is not None:
            self.offload.drop(step)
        return finished

    def _report(self, step: Step, start_s: float, end_s: float, schedule_s: float) -> None:
        self.num_steps += 1
        if self.on_step is None:
            return
        record = StepRecord(
            index=self.num_steps - 1,
            start_s=start_s,
            end_s=end_s,
            schedule_s=schedule_s,
            update_s=self.clock() - end_s,
            step=step,
            num_tokens=step.num_tokens,
            num_waiting=self.scheduler.num_waiting,
            num_free_blocks=self.scheduler.blocks.allocator.num_free,
            has_work=self.scheduler.has_work,
        )
        self.on_step(record)
