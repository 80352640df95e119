"""Loading, reloading, slots and queues, as in Ollama's server/sched.go."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from .knobs import Knobs
from .models import ModelSpec
from .payloads import Call

_ANY = None  # a load option the request leaves to the server
_LONGEST_TIMER_S = 86_400.0

LoadKey = tuple[Any, ...]


def load_key(call: Call, spec: ModelSpec) -> LoadKey:
    """The options of a runner: num_ctx, num_batch, num_gpu, main_gpu, use_mmap, num_thread, shift."""
    options = call.options
    num_ctx = options.get("num_ctx", _ANY)
    if num_ctx is not _ANY:
        num_ctx = min(max(4, int(num_ctx)), spec.context_length)
    num_gpu = options.get("num_gpu", -1)
    return (
        num_ctx,
        options.get("num_batch", _ANY),
        None if num_gpu is None or num_gpu < 0 else num_gpu,
        options.get("main_gpu", 0),
        options.get("use_mmap", _ANY),
        options.get("num_thread", 0),
        call.shift is not False,
    )


class Job:
    """One inference request on its way through the scheduler; subclasses do the work."""

    __slots__ = (
        "call",
        "cancelled",
        "in_slot",
        "is_reload",
        "key",
        "loaded_ns",
        "runner",
        "slot_ns",
        "spec",
        "start_ns",
    )

    def __init__(self, call: Call, spec: ModelSpec, start_ns: int) -> None:
        self.call = call
        self.spec = spec
        self.key: LoadKey = load_key(call, spec)
        self.start_ns = start_ns
        self.loaded_ns = start_ns
        self.slot_ns = start_ns
        self.runner: Runner | None = None
        self.cancelled = False
        self.in_slot = False
        self.is_reload = False

    def run(self) -> None:
        """Called when the job has a slot; it must call `Scheduler.release` in the end."""
        raise NotImplementedError

    def fail(self, status: int, message: str) -> None:
        """Answer with an error; called before the job has a runner, or when its runner died."""
        raise NotImplementedError


class Runner:
    """A loaded model."""

    __slots__ = (
        "dispatching",
        "expire_timer",
        "expires_at",
        "jobs",
        "key",
        "num_ctx",
        "prompt",
        "queue",
        "running",
        "session_s",
        "slots",
        "spec",
        "timer_at",
    )

    def __init__(self, spec: ModelSpec, key: LoadKey, knobs: Knobs) -> None:
        self.spec = spec
        self.key = key
        auto_ctx = min(knobs.default_num_ctx, spec.context_length)
        wanted: int = auto_ctx if key[0] is _ANY else key[0]
        self.num_ctx = min(wanted, knobs.most_ctx or wanted)
        self.slots = 1 if spec.is_embedding_only else knobs.slots
        self.session_s = knobs.keep_alive_s
        self.expires_at = time.time() + self.session_s
        self.expire_timer: asyncio.TimerHandle | None = None
        self.jobs: set[Job] = set()
        self.queue: deque[Job] = deque()
        self.running = 0
        self.timer_at = 0.0
        self.dispatching = False
        self.prompt: list[dict[str, Any]] = []

    def see_prompt(self, messages: list[dict[str, Any]]) -> float:
        """Keep *messages* as the cached prompt; returns the share of it that the one before does not begin with.

        Whole messages only, as the constant ones come first.
        """
        common = 0
        for before, now in zip(self.prompt, messages, strict=False):
            if before != now:
                break
            common += 1
        self.prompt = messages
        sizes = [len(message["content"]) for message in messages]
        return sum(sizes[common:]) / max(1, sum(sizes))

    def serves(self, key: LoadKey, knobs: Knobs) -> bool:
        """Return whether a request with *key* can use it without a reload."""
        mine = self.key
        if key == mine:
            return True
        if key[0] is not _ANY or mine[0] is not _ANY:
            default = min(knobs.default_num_ctx, self.spec.context_length)
            if (default if key[0] is _ANY else key[0]) != self.num_ctx:
                return False
        if (key[1] or 512) != (mine[1] or 512) or (key[2] is not None and key[2] != mine[2]):
            return False
        return key[3:] == mine[3:]


class Scheduler:
    """Gives every job a runner and a slot.

    A job for a loaded model goes straight to that runner's queue, which has no bound. Any other waits in the
    pending queue, bounded by ``max_queue``, while one model at a time is loaded.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, knobs: Knobs, changed: Callable[[], None]) -> None:
        self.knobs = knobs
        self.loaded: dict[str, Runner] = {}
        self.pending: deque[Job] = deque()
        self.queued = 0
        self.running = 0
        self.reset_counters()
        self._loop = loop
        self._changed = changed
        self._active: Job | None = None
        self._load_timer: asyncio.TimerHandle | None = None

    def reset_counters(self) -> None:
        """Set the totals to zero."""
        self.loads = self.reloads = self.load_aborts = self.unloads = self.rejected = 0
        self.max_running = self.running
        self.max_queued = 0
        self.busy_ns = 0

    @property
    def loading(self) -> bool:
        """True if a model is being loaded now."""
        return self._load_timer is not None

    def submit(self, job: Job) -> None:
        """Take *job*: it runs, waits, or fails with the 503 of a full pending queue."""
        runner = self.loaded.get(job.spec.name)
        if runner is not None and runner.serves(job.key, self.knobs):
            self._use(runner, job)
        elif self._active is not None and len(self.pending) >= self.knobs.max_queue:
            self.rejected += 1
            job.fail(503, "server busy, please try again.  maximum pending requests exceeded")
        else:
            self.pending.append(job)
            self._pump()

    def cancel(self, job: Job) -> None:
        """Forget *job*, whose client is gone: free its slot, or abort the load that it triggered."""
        job.cancelled = True
        if job.in_slot:
            self.release(job)
        elif job.runner is not None:
            self.queued -= 1
            self._leave(job.runner, job)
        elif job is self._active:
            if self._load_timer is not None:
                self._load_timer.cancel()
                self._load_timer = None
                self.load_aborts += 1
            self._active = None
            self._pump()
        elif job in self.pending:
            self.pending.remove(job)
        self._changed()

    def release(self, job: Job) -> None:
        """Give the slot of *job* to the next in the queue."""
        runner = job.runner
        if not job.in_slot or runner is None:
            return
        job.in_slot = False
        self.busy_ns += time.monotonic_ns() - job.slot_ns
        job.runner = None
        runner.running -= 1
        self.running -= 1
        self._leave(runner, job)
        if runner.queue:
            self._dispatch(runner)

    def crash(self, runner: Runner) -> list[Job]:
        """Unload *runner* at once; returns the jobs that it held, which the caller must fail."""
        jobs = list(runner.jobs)
        for job in jobs:
            if job.in_slot:
                self.busy_ns += time.monotonic_ns() - job.slot_ns
                self.running -= 1
            else:
                self.queued -= 1
            job.in_slot, job.runner, job.cancelled = False, None, True
        runner.jobs.clear()
        runner.queue.clear()
        self.unload(runner)
        self._pump()
        return jobs

    def expire(self, name: str) -> None:
        """Unload the model *name* as soon as it is idle."""
        runner = self.loaded.get(name)
        if runner is not None:
            runner.session_s = 0.0
            if not runner.jobs:
                self.unload(runner)

    def unload(self, runner: Runner) -> None:
        """Drop *runner*, whether idle or not."""
        if runner.expire_timer is not None:
            runner.expire_timer.cancel()
            runner.expire_timer = None
        if self.loaded.get(runner.spec.name) is runner:
            del self.loaded[runner.spec.name]
            self.unloads += 1

    def _pump(self) -> None:
        """Serve the pending queue as far as it goes now."""
        while self._active is not None or self.pending:
            if self._active is None:
                self._active = self.pending.popleft()
            if not self._advance(self._active):
                return

    def _advance(self, job: Job) -> bool:
        """Bring the active *job* to a runner; False while it waits for a load or for other jobs to end."""
        if self._load_timer is not None:
            return False
        runner = self.loaded.get(job.spec.name)
        if runner is not None and runner.serves(job.key, self.knobs):
            self._active = None
            self._use(runner, job)
            return True
        if runner is not None:
            job.is_reload = True
        elif len(self.loaded) >= self.knobs.max_loaded_models:
            runner = min(self.loaded.values(), key=lambda other: (len(other.jobs), other.session_s))
        if runner is not None:
            runner.session_s = 0.0
            if runner.jobs:
                return False  # the end of its last job pumps again
            self.unload(runner)
        self.loads += 1
        self.reloads += job.is_reload
        if self.knobs.load_delay_s > 0:
            self._load_timer = self._loop.call_later(self.knobs.load_delay_s, self._load_ended)
            self._changed()
            return False
        self._finish_load(job)
        return True

    def _load_ended(self) -> None:
        self._load_timer = None
        if self._active is not None:
            self._finish_load(self._active)
            self._pump()

    def _finish_load(self, job: Job) -> None:
        self._active = None
        if self.knobs.load_error is not None:
            job.fail(500, self.knobs.load_error)
            return
        runner = Runner(job.spec, job.key, self.knobs)
        self.loaded[job.spec.name] = runner
        self._use(runner, job)

    def _use(self, runner: Runner, job: Job) -> None:
        if job.call.keep_alive_s is not None:
            runner.session_s = job.call.keep_alive_s
        job.runner = runner
        job.loaded_ns = time.monotonic_ns()
        runner.jobs.add(job)
        runner.queue.append(job)
        self.queued += 1
        self._dispatch(runner)
        self.max_queued = max(self.max_queued, self.queued)

    def _dispatch(self, runner: Runner) -> None:
        """Start queued jobs while slots are free; flat, because a job may end before `run` returns."""
        if runner.dispatching:
            return
        runner.dispatching = True
        try:
            while runner.queue and runner.running < runner.slots:
                job = runner.queue.popleft()
                if job.cancelled:
                    continue
                self.queued -= 1
                runner.running += 1
                self.running += 1
                self.max_running = max(self.max_running, self.running)
                job.in_slot = True
                job.slot_ns = time.monotonic_ns()
                job.run()
        finally:
            runner.dispatching = False

    def _leave(self, runner: Runner, job: Job) -> None:
        runner.jobs.discard(job)
        if runner.jobs:
            return
        if runner.session_s <= 0:
            self.unload(runner)
        else:
            runner.expires_at = time.time() + runner.session_s
            if runner.expire_timer is None or runner.timer_at > runner.expires_at:
                self._arm_expiry(runner)
        if self._active is not None:
            self._pump()

    def _arm_expiry(self, runner: Runner) -> None:
        if runner.expire_timer is not None:
            runner.expire_timer.cancel()
        delay_s = min(max(0.0, runner.expires_at - time.time()), _LONGEST_TIMER_S)
        runner.timer_at = time.time() + delay_s
        runner.expire_timer = self._loop.call_later(delay_s, self._expire_if_idle, runner)

    def _expire_if_idle(self, runner: Runner) -> None:
        runner.expire_timer = None
        if self.loaded.get(runner.spec.name) is not runner or runner.jobs:
            return
        if runner.expires_at - time.time() > 0.002:
            self._arm_expiry(runner)
        else:
            self.unload(runner)
            self._changed()


def num_predict_of(options: Mapping[str, Any]) -> int:
    """``num_predict`` as sent; -1 when absent."""
    value = options.get("num_predict", -1)
    return -1 if value is None else int(value)
