"""Starting ranks from Python, and what launchers ask for."""
