"""Serve an artifact over HTTP: an image in, the most probable classes out.

    pip install 'dcnv3-tvm[serve]'
    python examples/service/app.py ARTIFACT --port 8000
    curl -F image=@photo.jpg http://127.0.0.1:8000/predict

docs/serving.md describes requests, limits and metrics.
"""

from __future__ import annotations

import argparse
import sys

import uvicorn
from service import Service
from uploads import Limits

import dcnv3_tvm
from dcnv3_tvm import checks
from dcnv3_tvm.errors import DCNv3Error
from dcnv3_tvm.machine import physical_cores
from dcnv3_tvm.runtime import CompiledModel, read_metadata


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", help="artifact folder")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: as compiled)")
    parser.add_argument(
        "--workers", type=int, help="calls side by side (default: the cores; on a GPU 1)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of a call (default: 1 a core)")
    parser.add_argument(
        "--max-batch",
        type=int,
        help="images of a call (default: 8 on a GPU; 1 on a CPU, where more take as long each)",
    )
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=2.0,
        help="an image waits so long for others while a worker is free (default: 2)",
    )
    parser.add_argument("--max-body-mb", type=float, default=10, help="(default: 10)")
    parser.add_argument("--max-megapixels", type=float, default=25, help="(default: 25)")
    parser.add_argument("--max-queue", type=int, default=64, help="requests (default: 64)")
    parser.add_argument("--timeout", type=float, default=10, help="seconds (default: 10)")
    parser.add_argument("--access-log", action="store_true", help="write a line for each request")
    return parser


def main() -> int:
    parser = make_parser()
    arguments = parser.parse_args()

    def load() -> CompiledModel:
        workers = arguments.workers
        if workers is None:
            is_gpu = read_metadata(arguments.artifact).target.arch != ""
            workers = 1 if is_gpu else physical_cores()
        return dcnv3_tvm.load(
            arguments.artifact,
            device=arguments.device,
            workers=workers,
            threads=arguments.threads,
        )

    try:
        checks.integer("--port", arguments.port, low=0, high=65535)
        limits = Limits(
            body_bytes=int(1e6 * checks.finite("--max-body-mb", arguments.max_body_mb)),
            pixels=int(1e6 * checks.finite("--max-megapixels", arguments.max_megapixels)),
            seconds=checks.finite("--timeout", arguments.timeout),
            queue=arguments.max_queue,
        )
        service = Service(
            load, limits, max_batch=arguments.max_batch, max_wait=arguments.max_wait_ms / 1e3
        )
    except DCNv3Error as error:
        parser.error(str(error))
    server = uvicorn.Server(
        uvicorn.Config(
            service.app(),
            host=arguments.host,
            port=arguments.port,
            access_log=arguments.access_log,
            timeout_graceful_shutdown=int(arguments.timeout) + 5,
        )
    )
    service.on_failure = lambda: setattr(server, "should_exit", True)
    server.run()
    if service.failure is not None:
        print(f"{sys.argv[0]}: the model cannot be loaded: {service.failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
