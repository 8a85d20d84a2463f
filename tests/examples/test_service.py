"""The service in this process, and its server in another one."""

import asyncio
import contextlib
import dataclasses
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from starlette.requests import Request

import dcnv3_tvm
from dcnv3_tvm.errors import ArtifactError
from dcnv3_tvm.runtime import CompiledModel, top_k
from dcnv3_tvm.signature import size_name
from helpers.toy import Toy

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

PNG = {"Content-Type": "image/png"}


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES / "service"))
    import service

    return service


class GatedModel:
    """A model whose calls wait for a gate.

    Parameters
    ----------
    model : CompiledModel
        The model.
    is_open : bool
        Whether the calls pass at first.
    """

    def __init__(self, model: CompiledModel, *, is_open: bool) -> None:
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.batches: list[int] = []
        self.edit: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
        self._model = model

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(len(images))
        assert self.gate.wait(60)
        return self.edit(self._model(images))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclasses.dataclass
class Running:
    service: Any
    app: Any
    client: httpx.AsyncClient
    model: GatedModel

    async def post(self, image: bytes) -> httpx.Response:
        return await self.client.post("/predict", content=image, headers=PNG)


@contextlib.asynccontextmanager
async def running(
    artifact: Path, *, workers: int = 2, max_batch: int = 8, is_open: bool = True, **limits: Any
) -> AsyncIterator[Running]:
    from service import Service
    from uploads import Limits

    model = GatedModel(dcnv3_tvm.load(artifact, workers=workers, threads=1), is_open=is_open)
    service = Service(lambda: model, Limits(**limits), max_batch=max_batch, max_wait=0.005)
    app = service.app()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        app.router.lifespan_context(app),
    ):
        try:
            while (await client.get("/readyz")).status_code == 503:
                await asyncio.sleep(0.001)
            yield Running(service, app, client, model)
        finally:
            model.gate.set()


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_each_response_belongs_to_its_image(artifact, make_image):
    images = [make_image(seed) for seed in range(64)]

    async def main() -> tuple[list[httpx.Response], list[int]]:
        async with running(artifact) as run:
            posts = [
                run.client.post("/predict?top=9", content=image, headers=PNG)
                if index % 2
                else run.client.post("/predict?top=9", files={"image": image})
                for index, image in enumerate(images)
            ]
            return await asyncio.gather(*posts), run.model.batches

    responses, batches = asyncio.run(main())
    model = dcnv3_tvm.load(artifact)
    shown = set()
    for image, response in zip(images, responses, strict=True):
        assert response.status_code == 200, response.text
        classes, probabilities = top_k(model(model.preprocess(image)), k=9)
        top = response.json()["top"]
        assert [row["class"] for row in top] == classes[0].tolist()
        assert [row["probability"] for row in top] == probabilities[0].tolist()
        shown.add(response.text)
    assert len(shown) == len(images), "the images do not differ"
    assert sum(batches) == len(images)
    assert 1 < max(batches) <= 8


def test_sizes(tmp_path, make_image):
    toy = Toy.build("n", sizes=((8, 8), (4, 16)))
    path = toy.write(tmp_path / "artifact")
    model = dcnv3_tvm.load(path)
    sizes = [None, (8, 8), (4, 16)]

    async def post(run: Running, seed: int, query: str) -> httpx.Response:
        content = make_image(seed)
        return await run.client.post(f"/predict{query}", content=content, headers=PNG)

    async def main() -> None:
        # One worker, which is busy: the others wait together.
        async with running(path, workers=1, max_batch=4, is_open=False) as run:
            queries = ["" if size is None else f"?size={size_name(size)}" for size in sizes]
            posts = [asyncio.create_task(post(run, 0, queries[0]))]
            await wait_until(lambda: run.model.batches == [1])
            posts += [asyncio.create_task(post(run, n, queries[n % 3])) for n in range(1, 13)]
            batcher = run.service._batcher
            await wait_until(lambda: sum(map(len, batcher._waiting.values())) == 12)
            run.model.gate.set()
            for seed, response in enumerate(await asyncio.gather(*posts)):
                image = model.preprocess(make_image(seed), size=sizes[seed % 3])
                best = response.json()["top"][0]["class"]
                assert best == toy.main(image).argmax(), seed
            assert sorted(run.model.batches) == [1, 4, 4, 4]
            response = await post(run, 0, "?size=4x8")
            assert response.status_code == 400
            assert "got '4x8'; allowed: 8x8, 4x16" in response.json()["error"]

    asyncio.run(main())


def test_batches_fill_up_while_the_model_is_busy(artifact, make_image):
    async def main() -> list[int]:
        async with running(artifact, workers=1, max_batch=4, is_open=False) as run:
            first = asyncio.create_task(run.post(make_image(0)))
            await wait_until(lambda: run.model.batches == [1])
            rest = [asyncio.create_task(run.post(make_image(seed))) for seed in range(1, 8)]
            batcher = run.service._batcher
            await wait_until(lambda: sum(map(len, batcher._waiting.values())) == 7)
            rest[2].cancel()  # Its client gives up: it is not computed.
            await asyncio.sleep(0)
            run.model.gate.set()
            await asyncio.gather(first, *rest, return_exceptions=True)
            return run.model.batches

    assert asyncio.run(main()) == [1, 4, 2]


def test_full_queue(artifact, make_image):
    async def main() -> None:
        async with running(artifact, is_open=False, queue=3) as run:
            waiting = [asyncio.create_task(run.post(make_image(0))) for _ in range(3)]
            await wait_until(lambda: run.service._queued == 3)
            response = await run.post(make_image(0))
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "1"
            assert "the queue is full; got 3 images" in response.json()["error"]
            run.model.gate.set()
            for response in await asyncio.gather(*waiting):
                assert response.status_code == 200
            assert run.service._queued == 0

    asyncio.run(main())


def test_queue_that_would_miss_its_deadline(artifact, make_image):
    async def main() -> None:
        async with running(artifact, workers=1, is_open=False, seconds=60) as run:
            run.service._observe_batch(4, 80.0, workers=1)  # Seconds an image: 20.
            waiting = asyncio.create_task(run.post(make_image(0)))  # Taken, as the model is idle.
            await wait_until(lambda: run.service._queued == 1)
            response = await run.post(make_image(0))
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "40"
            assert "1 images, for about 40.0 s; allowed: 30 s" in response.json()["error"]
            run.model.gate.set()
            assert (await waiting).status_code == 200

    asyncio.run(main())


def test_model_that_is_late_or_fails(artifact, make_image):
    async def main() -> None:
        async with running(artifact, is_open=False, seconds=0.05) as run:
            response = await run.post(make_image(0))
            assert response.status_code == 504
            assert "allowed: 0.05 s" in response.json()["error"]
            assert run.service._queued == 0

        async with running(artifact) as run:
            run.model.edit = lambda rows: np.full_like(rows, np.nan)
            response = await run.post(make_image(0))
            assert response.status_code == 500
            assert response.json() == {"error": "the service failed: InvalidArgumentError"}
            run.model.edit = lambda rows: rows
            assert (await run.post(make_image(0))).status_code == 200
            text = (await run.client.get("/metrics")).text
            for line in (
                'dcnv3_requests_total{status="500"} 1.0',
                'dcnv3_requests_total{status="200"} 1.0',
                "dcnv3_queue_length 0.0",
                "dcnv3_batch_images_count 2.0",
                "dcnv3_model_seconds_count 2.0",
            ):
                assert line in text.splitlines()

    asyncio.run(main())


def test_bodies_that_are_rejected(artifact, make_image):
    image = make_image(0)
    wide = make_image(0, (50, 41))
    as_eps = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(as_eps, "EPS")
    one_scan = make_image(0, kind="JPEG")
    scans = one_scan[:-2] + 50 * one_scan[one_scan.index(b"\xff\xda") : -2] + one_scan[-2:]
    # A text that is 2 MB when it is decompressed, for which pillow raises a ValueError.
    text = b"zTXta\0\0" + zlib.compress(bytes(2_000_000))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(1000)

    form = {"Content-Type": "multipart/form-data; boundary=x"}
    cases = [
        (
            {"content": image, "headers": {}},
            415,
            "not supported; got no Content-",
        ),
        (
            {"content": image, "headers": {"Content-Type": "image/svg+xml"}},
            415,
            "got image/svg+xml",
        ),
        ({"content": b"", "headers": PNG}, 400, "the image is empty"),
        ({"content": b"no image", "headers": PNG}, 415, "the content is not an image; got 8 bytes"),
        ({"content": as_eps.getvalue(), "headers": PNG}, 415, "the content is not an image"),
        ({"content": image[:-70], "headers": PNG}, 422, "the image cannot be read"),
        (
            {"content": image[:33] + chunk + image[33:], "headers": PNG},
            422,
            "Decompressed data too",
        ),
        ({"content": scans, "headers": PNG}, 413, "too many scans; got 51; allowed: 50"),
        ({"content": bytes(40_001), "headers": PNG}, 413, "got 40001 bytes; allowed: 40000 bytes"),
        ({"content": chunks(), "headers": PNG}, 413, "got at least 41000 bytes"),
        ({"content": wide, "headers": PNG}, 413, "got 41 x 50; allowed: 2000"),
        ({"files": {"photo": image}}, 400, "got photo; allowed: a file in the field 'image'"),
        ({"data": {"image": "text"}, "files": {"x": b""}}, 400, "the form has no file"),
        ({"content": b"", "headers": form}, 400, "got no fields"),
        ({"content": b"--x\r\n\r\n", "headers": form}, 400, "the form is malformed"),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, 400, "malformed"),
        ({"content": image, "headers": PNG, "params": {"top": "all"}}, 400, "got 'all'"),
    ]

    async def main() -> None:
        async with running(artifact, body_bytes=40_000, pixels=2000) as run:
            for arguments, status, message in cases:
                response = await run.client.post("/predict", **arguments)
                assert (response.status_code, message in response.json()["error"]) == (
                    status,
                    True,
                ), response.text
            assert (await run.client.get("/predict")).json() == {"error": "Method Not Allowed"}
            assert (await run.client.get("/x")).status_code == 404
            response = await run.client.post("/predict?top=999", content=image, headers=PNG)
            assert len(response.json()["top"]) == 192
            assert sum(run.model.batches) == 1

    asyncio.run(main())


def test_clients_that_are_slow_or_gone(artifact, make_image):
    async def never() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    async def call(run: Running, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "query_string": b"",
            "headers": [(b"content-type", b"image/png")],
        }

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await run.app(scope, receive, send)
        return sent

    async def main() -> None:
        async with running(artifact, is_open=False, seconds=0.05) as run:
            response = await run.client.post("/predict", content=never(), headers=PNG)
            assert response.status_code == 408
            assert "not received in time" in response.json()["error"]
            gone = {"type": "http.disconnect"}
            body = {"type": "http.request", "body": make_image(0)}
            for messages in ([{**body, "more_body": True}, gone], [body, gone]):
                sent = await call(run, messages)
                assert sent[0]["status"] == 499
            assert not run.model.batches
            assert run.service._queued == run.service._uploads == 0
            assert (await run.client.get("/healthz")).json() == {"status": "live"}

    asyncio.run(main())


def test_models_that_cannot_be_served(artifact, service):
    model = dcnv3_tvm.load(artifact)
    main = model.metadata.entries["main"]
    features = model.metadata.entries["features"]
    static = dataclasses.replace(main.inputs[0], shape=(4, 3, 8, 8))
    changes = {
        "returns logits": {"entries": {"main": features}},
        "no preprocessing": {"preprocessing": {}},
        "static batch": {"entries": {"main": dataclasses.replace(main, inputs=(static,))}},
    }
    stopped = []

    async def start(changed: dict[str, Any]) -> Exception:
        from uploads import Limits

        model.metadata = dataclasses.replace(metadata, **changed)
        served = service.Service(lambda: model, Limits(), max_batch=1, max_wait=0)
        served.on_failure = lambda: stopped.append(True)
        await served.start()
        response = await served.ready(Request({"type": "http"}))
        assert response.status_code == 503
        return served.failure

    metadata = model.metadata
    for message, changed in changes.items():
        with pytest.raises(ArtifactError, match=message):
            raise asyncio.run(start(changed))
    assert len(stopped) == 3


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.slow
def test_server_finishes_requests_when_it_is_stopped(artifact, make_image):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "service" / "app.py", artifact, "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait, 60)
        stack.callback(process.kill)
        for line in process.stderr:
            if "ready" in line:
                break
        upload = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        image = make_image(0)
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n"
        upload.sendall(f"{head}Content-Type: image/png\r\n\r\n".encode() + image[:20])
        # The server has begun to read this request when it answers a later one.
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        process.send_signal(signal.SIGTERM)
        while is_listening(port):
            time.sleep(0.01)
        upload.sendall(image[20:])
        answer = upload.makefile("rb").read().decode()
        assert answer.startswith("HTTP/1.1 200")
        assert len(json.loads(answer.partition("\r\n\r\n")[2])["top"]) == 5
        assert process.wait(60) == -signal.SIGTERM
