"""Collect images of concurrent requests into batches, and run a model on them in threads."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class _Item:
    image: np.ndarray
    result: asyncio.Future[np.ndarray]
    due: float


class Batcher:
    """Run a model on batches that wait at most some time for more images.

    All methods are called in the thread of the event loop. A batch has images of one size. It
    starts when a worker is free and it is full or its first image has waited long enough; while all
    workers are busy, it fills up.

    Parameters
    ----------
    model : callable
        Takes images (N, 3, H, W) and returns one row for each; called in threads.
    workers : int
        Number of calls side by side.
    max_batch : int
        Images of a call.
    max_wait : float
        Seconds that an image waits for others while a worker is free.
    observe : callable
        Called after each batch with its number of images and its seconds.
    """

    def __init__(
        self,
        model: Callable[[np.ndarray], np.ndarray],
        *,
        workers: int,
        max_batch: int,
        max_wait: float,
        observe: Callable[[int, float], None],
    ) -> None:
        self._model = model
        self._free = workers
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._observe = observe
        # By size, each in order of arrival.
        self._waiting: dict[tuple[int, ...], collections.deque[_Item]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, "model")
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, image: np.ndarray) -> asyncio.Future[np.ndarray]:
        """Return the future row of an image (1, 3, H, W); a cancelled one leaves the queue."""
        loop = asyncio.get_running_loop()
        item = _Item(image, loop.create_future(), loop.time() + self._max_wait)
        self._waiting.setdefault(image.shape, collections.deque()).append(item)
        self._start_batches()
        return item.result

    def close(self) -> None:
        """Wait for the running calls."""
        self._pool.shutdown()

    def _start_batches(self) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._free and (queues := [queue for queue in self._waiting.values() if queue]):
            queues.sort(key=lambda queue: queue[0].due)
            now = loop.time()
            ready = [q for q in queues if len(q) >= self._max_batch or q[0].due <= now]
            if not ready:
                self._timer = loop.call_at(queues[0][0].due, self._start_batches)
                return
            if batch := self._take_batch(ready[0]):
                self._free -= 1
                call = loop.run_in_executor(self._pool, self._run, [item.image for item in batch])
                call.add_done_callback(functools.partial(self._finish, batch))

    def _take_batch(self, queue: collections.deque[_Item]) -> list[_Item]:
        batch: list[_Item] = []
        while queue and len(batch) < self._max_batch:
            item = queue.popleft()
            if not item.result.done():  # Otherwise the request has ended: nobody waits for it.
                batch.append(item)
        return batch

    def _run(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        rows = self._model(np.concatenate(images) if len(images) > 1 else images[0])
        return rows, time.perf_counter() - start

    def _finish(
        self, batch: Sequence[_Item], call: asyncio.Future[tuple[np.ndarray, float]]
    ) -> None:
        self._free += 1
        error = call.exception()
        if error is None:
            rows, seconds = call.result()
            self._observe(len(batch), seconds)
        for index, item in enumerate(batch):
            if item.result.done():
                continue
            if error is None:
                item.result.set_result(rows[index : index + 1])
            else:
                item.result.set_exception(error)
        self._start_batches()
