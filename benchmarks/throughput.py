"""Compare images a second, from files to classes, of one process, Ray Data and the service.

    python benchmarks/throughput.py ARTIFACT [--json FILE]

Each burst classifies the same JPEG files of 640 x 480. Time starts with the first image: what Ray
takes to start its workers is printed apart.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from service_load import Client, photo, server

import dcnv3_tvm
from dcnv3_tvm.bench.measure import Quartiles
from dcnv3_tvm.provenance import Provenance
from dcnv3_tvm.runtime import top_k

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

PAUSE = 0.5
"""Seconds before a burst."""


def process(artifact: Path, workers: int) -> Callable[[Sequence[Path]], float]:
    """Return what measures one process with several workers of one thread."""
    model = dcnv3_tvm.load(artifact, workers=workers, threads=1, warm_up=True)
    pool = concurrent.futures.ThreadPoolExecutor(workers)

    def classify(path: Path) -> Any:
        return top_k(model(model.preprocess(path)))

    def measure(paths: Sequence[Path]) -> float:
        start = time.perf_counter()
        assert len(list(pool.map(classify, paths))) == len(paths)
        return len(paths) / (time.perf_counter() - start)

    return measure


def with_ray(artifact: Path, workers: int) -> Callable[[Sequence[Path]], float]:
    """Return what measures `map_batches` of the example, on a local cluster."""
    import ray
    from ray_batch import BATCH, Classifier

    environment = {"env_vars": {"PYTHONPATH": str(EXAMPLES)}}
    ray.init(runtime_env=environment, num_cpus=workers, ignore_reinit_error=True)

    class Timed(Classifier):
        """The example, with the time of each batch."""

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            start = time.time()
            columns = super().__call__(batch)
            count = len(batch["path"])
            return columns | {
                "start": np.full(count, start),
                "end": np.full(count, time.time()),
            }

    def measure(paths: Sequence[Path]) -> float:
        rows = (
            ray.data.from_items([{"path": str(path)} for path in paths])
            .map_batches(
                Timed,
                fn_constructor_args=(str(artifact),),
                batch_size=min(BATCH, len(paths) // (2 * workers)),
                num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=workers),
            )
            .take_all()
        )
        assert len(rows) == len(paths)
        assert not any(row["error"] for row in rows)
        start, end = min(row["start"] for row in rows), max(row["end"] for row in rows)
        return len(paths) / (end - start)

    return measure


def service(port: int, clients: int) -> Callable[[Sequence[Path]], float]:
    """Return what measures the service with several clients, which send the files."""

    async def send(paths: Sequence[Path]) -> int:
        images = [path.read_bytes() for path in paths]
        queue = iter(images)

        async def work() -> int:
            count = 0
            async with Client.connect(port) as client:
                for image in queue:
                    client.send(image)
                    status, _ = await client.receive()
                    count += status == 200
            return count

        return sum(await asyncio.gather(*(work() for _ in range(clients))))

    def measure(paths: Sequence[Path]) -> float:
        start = time.perf_counter()
        assert asyncio.run(send(paths)) == len(paths)
        return len(paths) / (time.perf_counter() - start)

    return measure


def main() -> None:
    """Measure all in turn, and print quartiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--images", type=int, default=64, help="of a burst")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    artifact = arguments.artifact.resolve()
    sys.path.insert(0, str(EXAMPLES))
    with tempfile.TemporaryDirectory() as folder, server(artifact, []) as port:
        paths = [Path(folder, f"{number}.jpg") for number in range(arguments.images)]
        for seed, path in enumerate(paths):
            path.write_bytes(photo(seed))
        counts = sorted({1, arguments.cores})
        measured = {
            **{f"process, {count} workers": process(artifact, count) for count in counts},
            **{f"Ray Data, {count} workers": with_ray(artifact, count) for count in counts[::-1]},
            f"service, {2 * arguments.cores} clients": service(port, 2 * arguments.cores),
        }
        found: dict[str, list[float]] = {name: [] for name in measured}
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for round_, (name, measure) in itertools.product(
            range(arguments.rounds + 1), measured.items()
        ):
            time.sleep(PAUSE)
            start = time.perf_counter()
            rate = measure(paths)
            if round_ > 0:  # The first round warms up.
                found[name].append(rate)
                seconds[name].append(time.perf_counter() - start - len(paths) / rate)
    rows = {}
    for name, rates in found.items():
        of = Quartiles.of(rates)
        start = Quartiles.of(seconds[name]).median
        print(
            f"{name:24} {of.median:6.2f} images/s ({of.lower:.2f} to {of.upper:.2f}), "
            f"start {start:.1f} s"
        )
        rows[name] = {"lower": of.lower, "median": of.median, "upper": of.upper, "start": start}
    if arguments.json is not None:
        report = {
            "kind": "throughput",
            "provenance": Provenance.here(arguments.cores).to_json(),
            "images": arguments.images,
            "images_per_second": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
