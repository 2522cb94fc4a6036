"""Runs a script under watch.

What it opens and whom it calls is written down, and the forbidden is refused.

    python watch.py REPORT MARK SCRIPT             opening a path that contains MARK fails,
                                                   and so does the network
    python watch.py REPORT MARK SCRIPT artifact    ... until the script has opened a .ptz file
                                                   for writing
"""

from __future__ import annotations

import os
import runpy
import sys

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def install(report: str, mark: str, until_artifact: bool) -> None:
    """Adds the audit hook. Each line of the report is one refused event."""
    log = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    written = []

    def refuse(line: str) -> None:
        os.write(log, (line + "\n").encode())
        raise PermissionError(f"refused under watch: {line}")

    def opened(path: str, flags: object) -> None:
        if ".ptz" in path and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
            written.append(path)
        elif mark in path and not (until_artifact and written):
            refuse(f"opened {os.path.basename(path)}")

    def connected(address: object) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            refuse(f"connected to {address[0]}")

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            opened(str(args[0]), args[2])
        elif event == "socket.connect":
            connected(args[1])

    sys.addaudithook(hook)


if __name__ == "__main__":
    install(sys.argv[1], sys.argv[2], sys.argv[4:] == ["artifact"])
    sys.argv = [sys.argv[3]]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
