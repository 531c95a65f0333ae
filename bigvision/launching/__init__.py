"""How ranks are started, and what their launchers ask for."""
