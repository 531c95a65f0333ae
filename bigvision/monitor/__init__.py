"""What a run reports while it goes on: step results come in, records, progress and the report go out.

Read monitor.py first: `Monitor` takes each step's result. records.py reads and writes metrics.jsonl, progress.py draws the bar,
stragglers.py finds slow ranks.
"""

from bigvision.monitor.monitor import Monitor
from bigvision.monitor.records import append_line, read_lines

__all__ = ["Monitor", "append_line", "read_lines"]
