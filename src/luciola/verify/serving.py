"""What the worker processes of `pool.py` have in common: their limits and their protocol.

One line of JSON each way: in a request and last in it the seconds it may take, out {"kind", "detail"} and perhaps
"reward"; first of all a line "ready". What the process may use is limited here; how long it may take is its parent's
business, because neither an alarm nor a thread can interrupt a power of large integers. What is called here sees
neither pipe: its stdin is empty, and what it prints is dropped.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Callable
from typing import Any


def serve(check: Callable[..., dict[str, Any]], file_mb: int = 0) -> None:
    """Answer requests until the input ends; whatever `check` raises, SystemExit included, makes the verdict "crash".

    The memory that the process may have, in MB, is the program's first argument.

    Args:
        file_mb: how large a file may become that the process writes.
    """
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    _limit(int(sys.argv[1]), file_mb)
    ours = os.getpid()
    print(json.dumps("ready"), file=replies, flush=True)
    for line in requests:
        *request, seconds = json.loads(line)
        _limit_processor_time(seconds)
        try:
            reply = check(*request)
        except (Exception, SystemExit) as error:
            reply = {"kind": "crash", "detail": f"the verifier raised {type(error).__name__}"}
        if os.getpid() != ours:  # `check` has forked: its child must not answer too
            os._exit(0)
        print(json.dumps(reply), file=replies, flush=True)


def _limit(memory_mb: int, file_mb: int) -> None:
    for what, limit in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        if sys.platform == "linux" or what != resource.RLIMIT_AS:  # macOS refuses to limit address space
            resource.setrlimit(what, (limit, limit))


def _limit_processor_time(seconds: float) -> None:
    """For a parent that dies while this process hangs: end a little after the parent would have ended it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
