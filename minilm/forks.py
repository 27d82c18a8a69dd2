"""Care for forked children, so that none waits for threads that only its parent has.

It is enough to import the package: the system calls what is registered here at each `os.fork`. A
child inherits four kinds of threads and locks for which it would wait without end:

- OpenMP's threads, in which torch computes, and which it keeps for the next time. They are let go
  just before a fork, whoever started them; parent and child start new ones when they need them.
- The threads of `tokenizers`. The library looks after them, but not where TOKENIZERS_PARALLELISM
  asks for them expressly; so it is set to "false" in the child.
- Locks of this package that another thread of the parent held.
- The lock of oneDNN's cache of kernels, which another thread has while it makes or drops one (torch
  2.13.0, November 2026): a child would wait at its first product. So a fork waits until no other
  thread is within a layer, which takes some milliseconds, and no other goes on meanwhile.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

__all__ = ["Lock", "mark_in_use", "unforked"]

_T = TypeVar("_T")

_SOFT = 1  # omp_pause_soft
_LONGEST_WAIT = 10.0  # seconds that a fork is held up, in case a thread is stuck
_PAUSE = 0.0005  # seconds between two looks

_in_use = False
_let_go = False
_locks: "WeakSet[threading.Lock]" = WeakSet()
# Threads, by number. What is done with these sets is one step of the interpreter.
_computing: set[int] = set()
_forking: set[int] = set()


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


def unforked(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function during which no other thread forks this process; not within itself."""
    this = threading.get_ident()
    try:
        _computing.add(this)
        while _forking:
            _computing.discard(this)
            time.sleep(_PAUSE)
            _computing.add(this)
        return function(*arguments)
    finally:
        _computing.discard(this)


def _before() -> None:
    global _let_go
    this = threading.get_ident()
    _forking.add(this)
    until = time.monotonic() + _LONGEST_WAIT
    while _computing - {this} and time.monotonic() < until:
        time.sleep(_PAUSE)
    if "torch" in sys.modules:
        # OpenMP 5.0; of the library that torch brings, which no other one stands in front of.
        pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
        _let_go = pause is not None and pause(_SOFT) == 0


def _in_parent() -> None:
    _forking.discard(threading.get_ident())


def _in_child() -> None:
    _forking.clear()
    _computing.intersection_update({threading.get_ident()})
    set_num_threads = getattr(sys.modules.get("torch"), "set_num_threads", None)
    if set_num_threads is not None and (_in_use or not _let_go):
        set_num_threads(1)
    if os.environ.get("TOKENIZERS_PARALLELISM"):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for lock in _locks:
        lock._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
