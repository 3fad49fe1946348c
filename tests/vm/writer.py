#!/usr/bin/python3
"""In the virtual machine: writes blocks whose content says which they are, syncs, and tells the host what is durable.

writer.py run FILE BLOCKS FIRST SEED [SNAPSHOTS]     until it is killed. On the port ``acks``, a line for each step:
    D <generation> <block>,<block>...      these blocks were written with this generation, and fsync returned
    B <name>      S <name>                 a snapshot of the volume begins; it is completed
writer.py check FILE FLOORS                compares FILE with a JSON list of the lowest generation of each block

A block is its number, its generation, and a digest of both again and again: nothing else is a block.
"""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time

SIZE = 4096
PORT = "/dev/virtio-ports/acks"
MOST = 48
"""Blocks between two syncs."""


def block(number: int, generation: int) -> bytes:
    head = struct.pack("<QQ", number, generation)
    digest = hashlib.sha256(head).digest()
    return head + digest * ((SIZE - len(head)) // len(digest)) + digest[: (SIZE - len(head)) % len(digest)]


def run(path: str, blocks: int, first: int, seed: int, snapshots: bool) -> None:
    rng = random.Random(seed)
    port = os.open(PORT, os.O_WRONLY)
    lock = threading.Lock()

    def tell(line: str) -> None:
        with lock:
            os.write(port, line.encode() + b"\n")

    def take() -> None:
        number = 0
        while True:
            number += 1
            name = f"s{first}-{number}"
            tell(f"B {name}")
            subprocess.run(["ebsctl", "snapshot", "data", "--name", name], check=True, stdout=subprocess.DEVNULL)
            tell(f"S {name}")
            time.sleep(1)

    if snapshots:
        threading.Thread(target=take, daemon=True).start()
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    generation = first
    while True:
        batch = rng.sample(range(blocks), rng.randint(1, MOST))
        for number in batch:
            os.pwrite(file, block(number, generation), number * SIZE)
        os.fsync(file)
        tell(f"D {generation} {','.join(map(str, batch))}")
        generation += 1


def check(path: str, floors: list[int]) -> int:
    """Print what is wrong, and a line with what was looked at."""
    wrong = written = newest = 0
    with open(path, "rb") as file:
        for number, floor in enumerate(floors):
            file.seek(number * SIZE)
            content = file.read(SIZE).ljust(SIZE, b"\0")
            if floor == 0 and content == bytes(SIZE):
                continue
            found, generation = struct.unpack_from("<QQ", content)
            if content != block(number, generation) or found != number:
                print(f"block {number} is none: {content[:32].hex()}")
                wrong += 1
            elif generation < floor:
                print(f"block {number} is of generation {generation}, and {floor} was durable")
                wrong += 1
            else:
                written += 1
                newest = max(newest, generation)
    print(f"{written} blocks as they should be, the newest of generation {newest}")
    return 1 if wrong else 0


def main() -> int:
    if sys.argv[1] == "run":
        path, blocks, first, seed = sys.argv[2], *map(int, sys.argv[3:6])
        run(path, blocks, first, seed, sys.argv[6:] == ["SNAPSHOTS"])
    with open(sys.argv[3]) as file:
        return check(sys.argv[2], json.load(file))


if __name__ == "__main__":
    sys.exit(main())
