"""Before a run: the memory and the time that it will need on devices that need not be here, and what follows from that.

In come a `Config` and a description of devices; out come bytes, seconds and the choices that auto makes. Read ``profile.py``
first, what a model's training step computes and keeps, then ``memory.py``, what each rank holds of it, and ``timing.py``, how
long it takes on what ``hardware.py`` describes. ``estimates.py`` has all of these for one run, ``choice.py`` ranks its layouts,
``start.py`` is what a run does with that when it starts, and ``command.py`` prints it.
"""
