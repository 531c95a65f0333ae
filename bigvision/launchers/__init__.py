"""Starting ranks from Python, and what launchers ask for."""

from __future__ import annotations
