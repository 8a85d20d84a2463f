"""An encoder as files, from which each contestant is started in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.alone import Task, run_alone
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.contestants import OURS, error_of
from dcnv3_tvm.bench.problems import encoder_problem
from dcnv3_tvm.compiler.compile import compile_artifact
from dcnv3_tvm.frontend.models.internimage import InternImage


class Deployed:
    """What the contestants open, made when it is first asked for.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    folder : Path
        Where files are written.
    threads : int
        Every process computes with.
    """

    def __init__(self, case: EncoderCase, folder: Path, threads: int) -> None:
        self.problem = encoder_problem(case)
        self._folder = folder
        self._threads = threads
        self._inputs = folder / "inputs.npz"
        inputs: dict[str, Any] = self.problem.inputs
        np.savez(self._inputs, **inputs)

    def run(
        self,
        task: str,
        contestant: str,
        *,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> tuple[dict[str, Any], float]:
        """Let a process do a task.

        Parameters
        ----------
        task : str
            One of `dcnv3_tvm.bench.alone.TASKS`.
        contestant : str
            `OURS` or the name of a peer.
        environment : dict of str to str, optional
            As of `run_alone`.
        **settings
            What else the task wants to know.

        Returns
        -------
        answer : dict
            Of the task.
        error : float
            Of the outputs, in the measure of the problem.
        """
        outputs = self._folder / "outputs.npz"
        answer = run_alone(
            Task(
                name=task,
                contestant=contestant,
                model=str(self._model(contestant)),
                inputs=str(self._inputs),
                outputs=str(outputs),
                threads=self._threads,
                settings=settings,
            ),
            environment,
        )
        with np.load(outputs) as file:
            found = [file[name] for name in file.files]
        outputs.unlink()
        return answer, error_of(found, self.problem.reference, self.problem.measure)

    def _model(self, contestant: str) -> Path:
        if contestant == "onnxruntime-deform":
            return self.problem.onnx_deform.path
        if contestant.startswith(("onnxruntime", "openvino")):
            return self.problem.onnx.path
        path = self._folder / ("artifact" if contestant == OURS else "module.pt")
        if path.exists():
            return path
        if contestant == OURS:
            source = self.problem.source
            assert isinstance(source, InternImage)
            example = tuple(self.problem.inputs["image"].shape)
            imported = frontend.import_model(source, example=example)
            compile_artifact(imported, path, dtype=self.problem.dtype)
        else:
            torch.save(self.problem.module, path)
        return path
