"""Load the service of examples/service over loopback: latency, throughput, memory, bad uploads.

    python benchmarks/service_load.py ARTIFACT [--json FILE] [--server="--max-batch 1"]
    python benchmarks/service_load.py ARTIFACT --requests 10000

The first command measures bursts at several concurrencies, in turn. The second sends so many
requests, a tenth of them bad, and prints the memory of the server. A client sends the next request
as soon as it has an answer: in bursts over one connection, with --requests over one for each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL.Image

from dcnv3_tvm.bench.measure import Quartiles
from dcnv3_tvm.provenance import Provenance

APP: Final = Path(__file__).resolve().parents[1] / "examples" / "service" / "app.py"

CONCURRENCIES: Final = (1, 2, 4, 8, 16, 32)

PERCENTILES: Final = (50, 90, 99)

PAUSE: Final = 0.5
"""Seconds before a burst."""


def photo(seed: int, *, width: int = 640, height: int = 480) -> bytes:
    """Make a JPEG file with structures of all sizes, as of a photo."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for side in (4, 16, 64, 256):
        noise = rng.uniform(0, 255, (side, side, 3)).astype(np.uint8)
        picture += np.asarray(PIL.Image.fromarray(noise).resize((width, height)), float) / 4
    file = io.BytesIO()
    PIL.Image.fromarray(picture.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


class Client:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, port: int) -> AsyncIterator[Client]:
        """Open a connection, and close it at the end."""
        client = cls(*await asyncio.open_connection("127.0.0.1", port))
        try:
            yield client
        finally:
            client.writer.close()
            with contextlib.suppress(OSError):
                await client.writer.wait_closed()

    def send(
        self, body: bytes, *, length: int | None = None, media_type: str = "image/jpeg"
    ) -> None:
        """Send a prediction request, whose declared length may be another."""
        head = (
            "POST /predict HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: {media_type}\r\nContent-Length: {length or len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)

    async def get(self, path: str) -> bytes:
        """Return what the server answers to a GET request."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return (await self.receive())[1]

    async def receive(self) -> tuple[int, bytes]:
        """Return status and body of an answer."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None, head
        return int(head.split(maxsplit=2)[1]), await self._reader.readexactly(int(length[1]))


@contextlib.contextmanager
def server(artifact: Path, options: Sequence[str]) -> Any:
    """Start the service, and yield its port when it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, APP, artifact, "--port", str(port), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "ready" in line:
                break
        else:
            raise SystemExit("".join(lines))
        yield port
    finally:
        process.terminate()
        process.wait()


async def burst(port: int, clients: int, seconds: float, images: Sequence[bytes]) -> list[float]:
    """Return the seconds of each request of several clients."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def work(number: int) -> None:
        async with Client.connect(port) as client:
            while (start := time.perf_counter()) < end:
                client.send(images[(number + len(times)) % len(images)])
                status, body = await client.receive()
                assert status == 200, body
                times.append(time.perf_counter() - start)

    await asyncio.gather(*map(work, range(clients)))
    return times


async def measure(port: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure bursts of each concurrency, in turn."""
    images = [photo(seed) for seed in range(16)]
    await burst(port, 4, seconds, images)
    rates: dict[int, list[float]] = {}
    times: dict[int, list[float]] = {}
    for _ in range(rounds):
        for clients in CONCURRENCIES:
            await asyncio.sleep(PAUSE)
            start = time.perf_counter()
            found = await burst(port, clients, seconds, images)
            rates.setdefault(clients, []).append(len(found) / (time.perf_counter() - start))
            times.setdefault(clients, []).extend(found)
    rows = {}
    for clients in CONCURRENCIES:
        rate = Quartiles.of(rates[clients])
        cuts = statistics.quantiles(times[clients], n=100, method="inclusive")
        latencies = {f"p{percent}": round(1e3 * cuts[percent - 1], 2) for percent in PERCENTILES}
        print(
            f"{clients:3} clients: {rate.median:7.2f} images/s "
            f"({rate.lower:.2f} to {rate.upper:.2f}); ms: "
            + ", ".join(f"{name} {value:.1f}" for name, value in latencies.items()),
            flush=True,
        )
        rows[str(clients)] = {
            "images_per_second": {"lower": rate.lower, "median": rate.median, "upper": rate.upper},
            "milliseconds": latencies,
            "requests": len(times[clients]),
        }
    return rows


async def truncated(client: Client, image: bytes) -> int:
    """Send half of an image."""
    client.send(image[: len(image) // 2])
    return (await client.receive())[0]


async def huge(client: Client, _: bytes) -> int:
    """Send 3 MB in chunks, without their number."""
    client.writer.write(
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    for _ in range(3):
        client.writer.write(b"f4240\r\n" + bytes(1_000_000) + b"\r\n")
    client.writer.write(b"0\r\n\r\n")
    return (await client.receive())[0]


async def bomb(client: Client, _: bytes) -> int:
    """Send a PNG file of 20 kB with 400 million pixels."""
    client.send(BOMB, media_type="image/png")
    return (await client.receive())[0]


async def wrong_type(client: Client, image: bytes) -> int:
    """Declare the image as text."""
    client.send(image, media_type="text/plain")
    return (await client.receive())[0]


async def no_image(client: Client, image: bytes) -> int:
    """Send something else as an image."""
    client.send(image[::-1])
    return (await client.receive())[0]


async def slow(client: Client, image: bytes) -> int:
    """Never send the rest of the body; the server's --timeout ends it."""
    client.send(image[:100], length=len(image))
    return (await client.receive())[0]


async def early_end(client: Client, image: bytes) -> int:
    """Close the connection within the body."""
    client.send(image[:100], length=len(image))
    await client.writer.drain()
    return 499


async def no_patience(client: Client, image: bytes) -> int:
    """Close the connection before the answer."""
    client.send(image)
    await client.writer.drain()
    return 499


def _bomb() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


BOMB: Final = _bomb()

BAD: Final[dict[Callable[[Client, bytes], Awaitable[int]], int]] = {
    truncated: 422,
    huge: 413,
    bomb: 413,
    wrong_type: 415,
    no_image: 415,
    slow: 408,
    early_end: 499,
    no_patience: 499,
}
"""Bad uploads, and the status that each gets."""


async def endure(port: int, requests: int, clients: int) -> dict[str, Any]:
    """Send many requests, a tenth of them bad; check each answer, and follow the memory."""
    images = [photo(seed, width=160, height=120) for seed in range(50)]
    expected = []
    async with Client.connect(port) as client:
        for image in images:
            client.send(image)
            expected.append(json.loads((await client.receive())[1])["top"])
    assert len({json.dumps(top) for top in expected}) == len(images)
    statuses: Counter[str] = Counter()
    memory = [await resident_bytes(port)]
    kinds = list(BAD)

    async def good(number: int) -> None:
        async with Client.connect(port) as client:
            client.send(images[number % len(images)])
            status, body = await client.receive()
        assert status == 200, body
        for found, wanted in zip(json.loads(body)["top"], expected[number % 50], strict=True):
            # A batch of another size may round in another way.
            assert found["class"] == wanted["class"], (found, wanted)
            assert abs(found["probability"] - wanted["probability"]) < 1e-4, (found, wanted)
        statuses["200"] += 1

    async def bad(number: int) -> None:
        kind = kinds[number // 10 % len(kinds)]
        async with Client.connect(port) as client:
            status = await kind(client, images[number % len(images)])
            assert status == BAD[kind], (kind.__name__, status)
            statuses[f"{status} {kind.__name__}"] += 1

    numbers = iter(range(requests))

    async def work() -> None:
        for number in numbers:
            await (bad(number) if number % 10 == 9 else good(number))
            if number % (requests // 10) == 0:
                memory.append(await resident_bytes(port))

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    seconds = time.perf_counter() - start
    await asyncio.sleep(1)
    memory.append(await resident_bytes(port))
    async with Client.connect(port) as client:
        text = (await client.get("/metrics")).decode()
    counted = dict(re.findall(r'dcnv3_requests_total\{status="(\d+)"\} (\d+)', text))
    left = re.search(r"^dcnv3_queue_length (\d+)", text, re.MULTILINE)
    assert left is not None
    assert left[1] == "0"
    print(f"{requests} requests in {seconds:.1f} s: {dict(sorted(statuses.items()))}")
    print(f"counted by the server: {dict(sorted(counted.items()))}")
    print("resident MB: " + ", ".join(f"{value / 1e6:.0f}" for value in memory))
    return {"statuses": statuses, "counted": counted, "resident_bytes": memory, "seconds": seconds}


async def resident_bytes(port: int) -> int:
    """Return the memory of the server."""
    async with Client.connect(port) as client:
        text = (await client.get("/metrics")).decode()
    found = re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def main() -> None:
    """Start the server, load it, and print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a burst")
    parser.add_argument("--requests", type=int, help="send so many, and follow the memory")
    parser.add_argument("--clients", type=int, default=16, help="of --requests")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--server", default="", help="arguments of the server")
    arguments = parser.parse_args()
    # Bad uploads end soon, and no request of the bursts is rejected.
    limits = "--timeout 3 --max-body-mb 2" if arguments.requests else "--timeout 600"
    options = shlex.split(f"{limits} {arguments.server}")
    with server(arguments.artifact, options) as port:
        if arguments.requests is None:
            found = asyncio.run(measure(port, arguments.rounds, arguments.seconds))
        else:
            found = asyncio.run(endure(port, arguments.requests, arguments.clients))
    if arguments.json is not None:
        report = {
            "kind": "service" if arguments.requests is None else "service-requests",
            "provenance": Provenance.here(2).to_json(),
            "server": options,
            "found": found,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
