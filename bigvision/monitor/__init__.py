"""What a run reports while it goes on: step results come in, records, progress and the report go out.

Read monitor.py first: `Monitor` takes each step's result. progress.py shows how far
a run is, trackers.py passes its records on, stragglers.py finds slow ranks. profile.py records the steps of
``monitor.profile``, trace.py reads what was recorded. The page of a run is apart: reporter.py writes it, of what report.py and
curves.py read in the run's folder and examples.py took from an evaluation; page/ has its HTML, style, script and charts.
"""

from bigvision.disk import append_line, read_lines
from bigvision.monitor.monitor import Monitor
from bigvision.monitor.profile import Profile
from bigvision.monitor.progress import Display, Forecast, main_metric
from bigvision.monitor.trackers import Tracker, Trackers, open_trackers

__all__ = [
    "Display",
    "Forecast",
    "Monitor",
    "Profile",
    "Tracker",
    "Trackers",
    "append_line",
    "main_metric",
    "open_trackers",
    "read_lines",
]
