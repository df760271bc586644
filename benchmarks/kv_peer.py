"""Lets others fetch the KV blocks of a tier's file, in a process of its own: see kv_tiers.py.

    python -m benchmarks.kv_peer FD FILE_BYTES BLOCK_BYTES BLOCK_SIZE FINGERPRINT KEY

FD is an inherited descriptor of the file; FINGERPRINT and KEY are hexadecimal. It prints its address, and ends with its
standard input.
"""

from __future__ import annotations

import sys

from splitfuse.config.engine import EngineConfig
from splitfuse.engine.block_file import BlockFile
from splitfuse.engine.remote.listener import Listener
from splitfuse.engine.tiers import Tiers


def main() -> None:
    fd, num_bytes, block_bytes, block_size = map(int, sys.argv[1:5])
    fingerprint, key = map(bytes.fromhex, sys.argv[5:7])
    file = BlockFile(fd, num_bytes=num_bytes, block_bytes=block_bytes, block_size=block_size, fingerprint=fingerprint)
    listener = Listener("127.0.0.1:0", key, EngineConfig())
    listener.read_block = Tiers({"memory": file}, block_bytes).read
    listener.start()
    print(listener.address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
