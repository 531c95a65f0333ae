"""Progress, metrics.jsonl and what the user reads at the end."""

from bigvision.monitor.monitor import Monitor

__all__ = ["Monitor"]
