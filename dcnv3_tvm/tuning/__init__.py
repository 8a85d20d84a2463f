"""Tuning: measure the schedules that kernels can have on a device, and keep the best."""

from dcnv3_tvm.tuning.tune import Tracker, TuneConfig, estimate, tune

__all__ = ["Tracker", "TuneConfig", "estimate", "tune"]
