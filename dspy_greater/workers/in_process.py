"""A worker inside this process: the slow, obvious twin of one in another, for tests and for reading.

It computes when it is asked, so several of them take turns and nothing gets faster.
"""

from __future__ import annotations

from concurrent.futures import Future

from dspy_greater.model.engine import Engine
from dspy_greater.workers.jobs import Answer, Job, JobRunner
from dspy_greater.workers.pool import Pool


class InProcessWorker:
    """A `Worker` over the weights of an engine, with an engine of its own over them.

    >>> worker = InProcessWorker(Engine.from_pretrained("pocket", device="cpu"))
    >>> worker.submit(Job("next", ((1, 5, 6),))).result().values.shape[0]
    1
    """

    def __init__(self, engine: Engine) -> None:
        own = Engine(
            engine.model,
            engine.tokenizer,
            name=engine.name,
            max_batch_rows=engine.max_batch_rows,
            max_batch_tokens=engine.max_batch_tokens,
        )
        self._runner = JobRunner(own)
        self.device = str(engine.weights.device)

    def submit(self, job: Job) -> Future[Answer]:
        """See `Worker`; the job is done when this returns."""
        future: Future[Answer] = Future()
        try:
            future.set_result(self._runner.run(job))
        except Exception as error:  # raised again where the result is asked for
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing to end."""


def in_process(engine: Engine, count: int) -> Pool:
    """A pool of so many workers in this process."""
    return Pool([InProcessWorker(engine) for _ in range(count)], lambda: InProcessWorker(engine))
