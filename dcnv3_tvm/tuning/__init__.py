"""Tuning: measure the schedules that a kernel can have on a device, and keep the best."""
