"""What the server of a bench's processes loads; then it hears interrupts again, and so do those it will start.

It is started deaf to them, since Ctrl-C while it loads would end it. But it outlives the bench, and others in this
process may use it.
"""

import signal

import rankrace.bench.job as job

__all__ = ["job"]

_before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that came meanwhile is gone
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
signal.signal(signal.SIGINT, _before)
