"""The program that tries grammars for a server: it compiles what strangers send, and may be killed at any moment.

``python -m argosy.server.grammar_process DIRECTORY``, started by ``grammar_door.py``, with a tokenizer's directory.
Messages in and out are a length of four bytes, then msgpack. It loads no torch. Invariant: it ends with its parent.
"""

import resource
import signal
import sys

import msgspec

from argosy.engine.tokenizer import Tokenizer
from argosy.grammar.compiler import GrammarCompiler
from argosy.sampling_params import StructuredOutputsParams
from argosy.server.child_process import die_with_parent

LENGTH_BYTES = 4
READY = b""  # the first message: grammars can be sent
MAX_MEMORY_BYTES = 4 * 2**30  # of address space


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent ends this process, after its requests
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    compiler = GrammarCompiler(Tokenizer.from_directory(sys.argv[1]).vocabulary())
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    decoder = msgspec.msgpack.Decoder(StructuredOutputsParams)
    _write(READY)
    while head := sys.stdin.buffer.read(LENGTH_BYTES):
        structured = decoder.decode(sys.stdin.buffer.read(int.from_bytes(head, "big")))
        try:
            compiler.check(structured)
            _write(msgspec.msgpack.encode(None))
        except (ValueError, MemoryError) as error:
            _write(msgspec.msgpack.encode(str(error) or "it takes too much memory"))


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
