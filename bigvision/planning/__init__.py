"""Before a run: what it needs of memory and time, on which hardware, and which strategy is best."""
