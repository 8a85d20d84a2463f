"""What the service counts, in the text form of Prometheus."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)


class Metrics:
    """Counters of one service, apart from those of the process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # Memory, CPU time and open files.
        self._registry = registry
        self.requests = Counter(
            "dcnv3_requests", "Requests for a prediction", ["status"], registry=registry
        )
        self.seconds = Histogram(
            "dcnv3_request_seconds",
            "Seconds from the headers of a request to its response",
            buckets=[0.001 * 2**step for step in range(15)],
            registry=registry,
        )
        self.queue = Gauge(
            "dcnv3_queue_length",
            "Images that wait for a decoder or the model, or are being computed",
            registry=registry,
        )
        self.batch = Histogram(
            "dcnv3_batch_images",
            "Images of a call of the model",
            buckets=[2**step for step in range(8)],
            registry=registry,
        )
        self.model = Histogram(
            "dcnv3_model_seconds",
            "Seconds of a call of the model",
            buckets=[0.001 * 2**step for step in range(15)],
            registry=registry,
        )

    def observe_batch(self, images: int, seconds: float) -> None:
        """Count a call of the model."""
        self.batch.observe(images)
        self.model.observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """Return all values and their media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
