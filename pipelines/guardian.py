"""``python guardian.py COMMAND …``: run a command that must not outlive the process which asked for it.

The caller holds the other end of standard input and never writes. When that end closes, because the caller cancels or
because it was killed, the command goes, and all that it started: interrupted first, since a training saves its state on
that, then terminated, then killed.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

import psutil

STEPS = ((signal.SIGINT, 5.0), (signal.SIGTERM, 1.5), (signal.SIGKILL, 1.0))  # at most this many seconds for each
STOP_SECONDS = 9.0  # all of them, and the time to notice
STOPPED = 128 + signal.SIGTERM
PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """Run the command; returns its exit code, 128 + n where signal n ended it."""
    if sys.platform == "linux":  # who loses its parent becomes ours instead of the system's, in whatever session it is
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    stopping = threading.Event()
    stopper = threading.Thread(target=stop_with_caller, args=(stopping,), daemon=True)
    stopper.start()
    code = process.returncode = ended(process.pid)
    if stopping.is_set():  # who stops may have collected the command first, and its code reads 0: to leave now would spare the rest
        stopper.join()
    if code:
        stop_descendants()  # what was killed leaves its own children behind
    return code if code >= 0 else 128 - code


def ended(command: int) -> int:
    """Exit code of the command; until then whoever was given to us is collected when it ends, for a server lives long and starts many."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.wait()
            if pid == command:
                return os.waitstatus_to_exitcode(status)
    return 0


def stop_with_caller(stopping: threading.Event) -> None:
    """Wait for the end of standard input, then stop everything and this process."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    stopping.set()
    stop_descendants()
    os._exit(STOPPED)


def stop_descendants() -> None:
    """Make every process below this one leave."""
    known: set[psutil.Process] = set()
    for number, seconds in STEPS:
        known.update(psutil.Process().children(recursive=True))
        for process in known:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if not psutil.wait_procs(known, seconds)[1]:
            break


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
