"""The tests: one folder per package."""

import signal

# A shell that starts the tests in the background lets them ignore Ctrl-C, and the programs that they start with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
