"""Care for forked children, so that none waits for threads that only its parent has.

It is enough to import the package: the system calls what is registered here at each `os.fork`. A
child inherits three kinds of threads and locks for which it would wait without end:

- OpenMP's threads, in which torch computes, and which it keeps for the next time. They are let go
  just before a fork, whoever started them; parent and child start new ones when they need them.
- The threads of `tokenizers`. The library looks after them, but not where TOKENIZERS_PARALLELISM
  asks for them expressly; so it is set to "false" in the child.
- Locks of this package that another thread of the parent held.

Out of reach is the lock of oneDNN's cache of kernels, which another thread has while it makes or
drops one (torch 2.13.0, November 2026): a child forked just then waits at its first product.
"""

import ctypes
import os
import sys
import threading
from weakref import WeakSet

__all__ = ["Lock", "mark_in_use"]

_SOFT = 1  # omp_pause_soft

_in_use = False
_let_go = False
_locks: "WeakSet[threading.Lock]" = WeakSet()


def mark_in_use() -> None:
    """Note that texts are embedded in this process, so that forks of it compute in one thread.

    Before the first text a server only gets ready, and the processes that it forks may use all
    threads.
    """
    global _in_use
    _in_use = True


def Lock() -> threading.Lock:  # noqa: N802  # as threading.Lock
    """A lock that is free in a forked child."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def _before() -> None:
    global _let_go
    if "torch" in sys.modules:
        # OpenMP 5.0; of the library that torch brings, which no other one stands in front of.
        pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
        _let_go = pause is not None and pause(_SOFT) == 0


def _in_child() -> None:
    set_num_threads = getattr(sys.modules.get("torch"), "set_num_threads", None)
    if set_num_threads is not None and (_in_use or not _let_go):
        set_num_threads(1)
    if os.environ.get("TOKENIZERS_PARALLELISM"):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for lock in _locks:
        lock._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_in_child)
