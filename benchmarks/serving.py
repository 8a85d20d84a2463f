"""Measure the throughput of one artifact with threads, workers and processes, alternating.

A client is a thread that calls the model again as soon as it has a result. Processes are forked:

    dcnv3-tvm compile internimage_t --random-weights 0 -o t
    python benchmarks/serving.py t [--rounds 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import dcnv3_tvm
from dcnv3_tvm.bench.measure import Quartiles
from dcnv3_tvm.provenance import Provenance

PAUSE = 0.5
"""Seconds before a burst, in which the threads of the previous one stop spinning."""


def images_per_second(model: dcnv3_tvm.CompiledModel, clients: int, seconds: float) -> float:
    """Call a model from several threads, and return its throughput."""
    info = model.metadata.entries["main"].inputs[0]
    image = np.random.default_rng(0).standard_normal(info.shape, np.float32)
    counts = [0] * clients
    start = time.perf_counter()

    def work(client: int) -> None:
        while time.perf_counter() < start + seconds:
            model(image)
            counts[client] += len(image)

    threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def serve(artifact: Path, connection: Connection) -> None:
    """Measure one process of one thread whenever asked to."""
    model = dcnv3_tvm.load(artifact, threads=1)
    while (seconds := connection.recv()) is not None:
        connection.send(images_per_second(model, 1, seconds))


def settings(artifact: Path, cores: int) -> dict[str, Callable[[float], float]]:
    """Return what is compared: functions of the seconds of a burst."""
    one = dcnv3_tvm.load(artifact, threads=cores)
    several = dcnv3_tvm.load(artifact, workers=cores, threads=1)
    connections = []
    for _ in range(cores):
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        context.Process(target=serve, args=(artifact, there), daemon=True).start()
        connections.append(here)

    def processes(seconds: float) -> float:
        for connection in connections:
            connection.send(seconds)
        return sum(connection.recv() for connection in connections)

    return {
        f"1 worker of {cores} threads, 1 client": lambda s: images_per_second(one, 1, s),
        f"1 worker of {cores} threads, {cores} clients": lambda s: images_per_second(one, cores, s),
        f"{cores} workers of 1 thread, {cores} clients": lambda s: images_per_second(
            several, cores, s
        ),
        f"{cores} processes of 1 thread": processes,
    }


def main() -> None:
    """Measure all settings in turn, and print quartiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a burst")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    measured = settings(arguments.artifact, arguments.cores)
    for round_ in range(arguments.rounds + 1):
        for name, measure in measured.items():
            time.sleep(PAUSE)
            rate = measure(arguments.seconds)
            if round_ > 0:  # The first round warms up.
                found.setdefault(name, []).append(rate)
    rows = {}
    for name, rates in found.items():
        of = Quartiles.of(rates)
        print(f"{name:36} {of.median:6.2f} images/s ({of.lower:.2f} to {of.upper:.2f})")
        rows[name] = {"lower": of.lower, "median": of.median, "upper": of.upper}
    if arguments.json is not None:
        provenance = Provenance.here(arguments.cores).to_json()
        report = {"kind": "serving", "provenance": provenance, "images_per_second": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
