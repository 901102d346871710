"""How long a server takes to refuse: what `bench.soak` runs beside its callers, in a process that does nothing else."""

import json
import re
import select
import socket
import sys
import time

_PAUSE_SECONDS = 0.1


def main(url: str) -> None:
    """Ask again and again until the standard input ends; write the seconds of each refusal."""
    host, _, port = url.removeprefix("http://").partition(":")
    data = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "n": 8}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    asked = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    found: list[float] = []
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        while not select.select([sys.stdin], [], [], _PAUSE_SECONDS)[0]:
            begin = time.perf_counter()
            connection.sendall(asked)
            answer = b""
            while not _is_whole(answer):
                answer += connection.recv(1 << 16)
            if b" 429 " in answer[:20]:
                found.append(time.perf_counter() - begin)
    print(json.dumps(found))


def _is_whole(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(found and length) and len(body) >= int(length[1])


if __name__ == "__main__":
    main(sys.argv[1])
