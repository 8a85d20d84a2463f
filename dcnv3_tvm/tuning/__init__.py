"""Tuning: measure candidate schedules on a device and record the fastest of each kernel."""

from dcnv3_tvm.tuning.rpc import RpcConfig
from dcnv3_tvm.tuning.tune import TuneConfig, estimate, tune

__all__ = ["RpcConfig", "TuneConfig", "estimate", "tune"]
