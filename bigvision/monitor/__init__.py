"""What a run reports while it goes on: step results come in, records, progress and the report go out.

Read monitor.py first: `Monitor` takes each step's result. records.py reads and writes metrics.jsonl, progress.py draws the bar,
stragglers.py finds slow ranks. profile.py records the steps of ``monitor.profile``, trace.py reads what was recorded.
"""

from bigvision.monitor.monitor import Monitor
from bigvision.monitor.profile import Profile
from bigvision.monitor.records import append_line, read_lines

__all__ = ["Monitor", "Profile", "append_line", "read_lines"]
