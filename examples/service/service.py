"""The handlers of requests, and the way of an image from the body to the classes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import numpy as np
from batching import Batcher
from metrics import Metrics
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uploads import Limits, RejectedError, decode, read_upload

from dcnv3_tvm import checks
from dcnv3_tvm.errors import ArtifactError, ImageError
from dcnv3_tvm.machine import physical_cores
from dcnv3_tvm.runtime import CompiledModel, top_k
from dcnv3_tvm.signature import size_name

CLIENT_CLOSED: Final = 499
"""Status, in the metrics only, of requests whose clients did not wait."""

RETRY: Final = {"Retry-After": "1"}

log = logging.getLogger("uvicorn.error")


class Service:
    """A model, its queue and the handlers of requests.

    Parameters
    ----------
    load : callable
        Returns the model; called in a thread, so that ``/healthz`` answers meanwhile.
    limits : Limits
        What a request may need.
    max_batch : int or None
        Images of a call, of an artifact with dynamic batch; by default 8 on a GPU and 1 on a CPU,
        where several images take as long as one after another.
    max_wait : float
        Seconds that an image waits for others while a worker is free.
    """

    def __init__(
        self,
        load: Callable[[], CompiledModel],
        limits: Limits,
        *,
        max_batch: int | None,
        max_wait: float,
    ) -> None:
        self.limits = limits
        self.metrics = Metrics()
        self.on_failure: Callable[[], None] = lambda: None
        """Called if the model cannot be loaded."""
        self.failure: Exception | None = None
        self._load = load
        if max_batch is not None:
            checks.integer("max_batch", max_batch, low=1)
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._model: CompiledModel | None = None
        self._batcher: Batcher
        self._decoders = concurrent.futures.ThreadPoolExecutor(physical_cores(), "decode")
        self._uploads = 0
        self._queued = 0
        self._seconds_per_image = 0.0

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/predict", self.predict, methods=["POST"]),
                Route("/healthz", self.live),
                Route("/readyz", self.ready),
                Route("/metrics", self.show_metrics),
            ],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_error, Exception: _internal_error},
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(self.start())
        yield
        await loading
        self._decoders.shutdown()
        if self._model is not None:
            self._batcher.close()
            self._model.close()

    async def start(self) -> None:
        """Load the model and warm it up."""
        try:
            model = await asyncio.to_thread(self._load_warm)
        except Exception as error:  # Whatever it is, there is nothing to serve.
            self.failure = error
            self.on_failure()
            return
        default = 1 if model.device == "cpu" else 8
        self._batcher = Batcher(
            model,
            workers=model.workers,
            max_batch=(self._max_batch or default) if _has_dynamic_batch(model) else 1,
            max_wait=self._max_wait,
            observe=functools.partial(self._observe_batch, workers=model.workers),
        )
        self._model = model
        log.info("ready: %r", model)

    def _load_warm(self) -> CompiledModel:
        model = self._load()
        _check_classifies(model)
        model.warm_up()
        return model

    async def live(self, _: Request) -> Response:
        """Answer as long as the event loop runs."""
        return JSONResponse({"status": "live"})

    async def ready(self, _: Request) -> Response:
        """Tell whether the model is loaded and warm."""
        if self._model is None:
            return JSONResponse({"status": "loading"}, 503, headers=RETRY)
        metadata = self._model.metadata
        return JSONResponse(
            {"status": "ready", "model": metadata.name, "target": metadata.target.slug}
        )

    async def show_metrics(self, _: Request) -> Response:
        """Return the metrics."""
        content, media_type = self.metrics.text()
        return Response(content, media_type=media_type)

    async def predict(self, request: Request) -> Response:
        """Return the most probable classes of the image in the body."""
        start = time.perf_counter()
        try:
            response = await self._predict(request)
        except RejectedError as error:
            response = _error(error.status, error, error.headers)
        except ImageError as error:
            response = _error(422, error)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED)  # Nobody receives it.
        except Exception:  # It is counted here, and answered by Starlette.
            self.metrics.requests.labels("500").inc()
            raise
        self.metrics.requests.labels(str(response.status_code)).inc()
        self.metrics.seconds.observe(time.perf_counter() - start)
        return response

    async def _predict(self, request: Request) -> Response:
        start = time.perf_counter()
        model = self._model
        if model is None:
            raise RejectedError(503, "the model is not loaded yet", headers=RETRY)
        number = _number_of_classes(request, model)
        size = _image_size(request, model)
        self._check_queue(model.workers)
        if self._uploads >= self.limits.queue:
            raise RejectedError(
                503, "too many bodies are being received", got=self._uploads, headers=RETRY
            )
        self._uploads += 1
        try:
            data = await read_upload(request, self.limits)
        finally:
            self._uploads -= 1
        self._check_queue(model.workers)
        self._set_queued(self._queued + 1)
        try:
            left = self.limits.seconds - (time.perf_counter() - start)
            logits = await self._within(left, request, self._compute(model, data, size))
        finally:
            self._set_queued(self._queued - 1)
        classes, probabilities = top_k(logits, k=number)
        labels = model.metadata.labels
        top = [
            {"class": int(class_), "probability": float(probability)}
            | ({"label": labels[class_]} if labels else {})
            for class_, probability in zip(classes[0], probabilities[0], strict=True)
        ]
        return JSONResponse({"top": top})

    def _check_queue(self, workers: int) -> None:
        """Reject an image that would wait too long, before it takes memory and time."""
        if self._queued >= self.limits.queue:
            raise RejectedError(
                503, "the queue is full", got=f"{self._queued} images", headers=RETRY
            )
        expected = (self._queued + 1) * self._seconds_per_image
        # Half, because the estimate is rough. Without it, a queue in overload consists of images
        # whose time ends while they are computed, and no request succeeds.
        if self._queued >= workers and expected > self.limits.seconds / 2:
            raise RejectedError(
                503,
                "the queue is too long",
                got=f"{self._queued} images, for about {expected:.1f} s",
                allowed=f"{self.limits.seconds / 2:g} s, half of the time of a request",
                headers={"Retry-After": str(math.ceil(expected))},
            )

    def _observe_batch(self, images: int, seconds: float, workers: int) -> None:
        self.metrics.observe_batch(images, seconds)
        latest = seconds / images / workers
        previous = self._seconds_per_image or latest
        self._seconds_per_image = previous + 0.1 * (latest - previous)

    def _set_queued(self, queued: int) -> None:
        self._queued = queued
        self.metrics.queue.set(queued)

    async def _compute(
        self, model: CompiledModel, data: bytes, size: tuple[int, int] | None
    ) -> np.ndarray:
        def prepare() -> np.ndarray:
            return model.preprocess(decode(data, self.limits), size=size)

        image = await asyncio.get_running_loop().run_in_executor(self._decoders, prepare)
        return await self._batcher.submit(image)

    async def _within(self, seconds: float, request: Request, computation: Any) -> np.ndarray:
        """Wait for a result, for the client's disconnection or for the end of the time."""
        work = asyncio.ensure_future(computation)
        # After the body, the next message of a connection is its end.
        closed = asyncio.ensure_future(request.receive())
        try:
            done, _ = await asyncio.wait(
                {work, closed}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if work in done:
                return work.result()
            if closed in done:
                raise ClientDisconnect
            raise RejectedError(
                504, "the result was not ready in time", allowed=f"{self.limits.seconds:g} s"
            )
        finally:
            # What has not started leaves the queues; a running call ends by itself.
            work.cancel()
            closed.cancel()


def _has_dynamic_batch(model: CompiledModel) -> bool:
    return isinstance(model.metadata.entries["main"].inputs[0].shape[0], str)


def _check_classifies(model: CompiledModel) -> None:
    entry = model.metadata.entries["main"]
    if len(entry.outputs) != 1 or len(entry.outputs[0].shape) != 2:
        raise ArtifactError(
            "the service needs a model that returns logits",
            got=", ".join(info.describe() for info in entry.outputs),
        )
    if not model.metadata.preprocessing:
        raise ArtifactError("the artifact has no preprocessing settings, which the service needs")
    if entry.inputs[0].shape[0] != 1 and not _has_dynamic_batch(model):
        raise ArtifactError(
            "the artifact has a static batch of several images",
            got=entry.inputs[0].describe(),
            hint="Compile it with --dynamic-batch, or without --batch.",
        )


def _number_of_classes(request: Request, model: CompiledModel) -> int:
    text = request.query_params.get("top", "5")
    classes = int(model.metadata.entries["main"].outputs[0].shape[1])
    if not (text.isdecimal() and len(text) < 10 and int(text) >= 1):
        raise RejectedError(400, "top is not a number of classes", got=repr(text), allowed="?top=5")
    return min(int(text), classes)


def _image_size(request: Request, model: CompiledModel) -> tuple[int, int] | None:
    """Return the size that the image gets, of those that were compiled; None for the first."""
    text = request.query_params.get("size")
    if text is None:
        return None
    sizes = {size_name(size): size for size in model.metadata.image_sizes}
    # A model of a dynamic size has none: a request must not choose how much memory it takes.
    if text not in sizes:
        raise RejectedError(
            400,
            "size is not one of the model's",
            got=repr(text),
            allowed=", ".join(sizes) or "none",
        )
    return sizes[text]


def _error(status: int, error: object, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": str(error)}, status, headers)


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


def _internal_error(_: Request, error: Exception) -> Response:
    # Starlette raises it again after the response: uvicorn writes its traceback to the log.
    return _error(500, f"the service failed: {type(error).__name__}")
