"""Before a run: the memory and the time that it will need on devices that need not be here.

In come a `Config` and a description of devices; out come bytes, seconds and the choices that follow. Read ``profile.py`` first,
what a model's training step computes and keeps, then ``memory.py``, what each rank holds of it.
"""
