#!/usr/bin/python3
"""In the virtual machine: runs root commands that come over a virtio port, one at a time, and answers what they did.

A request is a line of JSON {"id", "command", "timeout"}; its answer {"id", "status", "stdout", "stderr"}.
"""

import json
import os
import subprocess
import time

PORT = "/dev/virtio-ports/agent"


def run(request: dict) -> dict:
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", request["command"]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=request["timeout"],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"},
            cwd="/root",
        )
    except subprocess.TimeoutExpired as exc:
        return {"status": 124, "stdout": _text(exc.stdout), "stderr": _text(exc.stderr)}
    return {"status": done.returncode, "stdout": _text(done.stdout), "stderr": _text(done.stderr)}


def _text(data: bytes | None) -> str:
    return (data or b"").decode(errors="replace")


def main() -> None:
    port = os.open(PORT, os.O_RDWR)
    pending = b""
    while True:
        data = os.read(port, 1 << 16)
        if not data:  # nobody is on the host's side
            time.sleep(0.2)
            continue
        pending += data
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            request = json.loads(line)
            answer = json.dumps({"id": request["id"], **run(request)}).encode() + b"\n"
            while answer:
                answer = answer[os.write(port, answer) :]


if __name__ == "__main__":
    main()
