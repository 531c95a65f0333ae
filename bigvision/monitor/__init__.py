"""What a run reports while it goes on: step results come in, records, progress and the report go out.

Read monitor.py first: `Monitor` takes each step's result. records.py reads and writes metrics.jsonl, progress.py draws the bar,
stragglers.py finds slow ranks. The page of a run is apart: reporter.py writes it, of what report.py and curves.py read in the
run's folder and examples.py took from an evaluation; page/ has its HTML, style, script and chart library.
"""

from bigvision.monitor.monitor import Monitor
from bigvision.monitor.records import append_line, read_lines

__all__ = ["Monitor", "append_line", "read_lines"]
