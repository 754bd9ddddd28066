"""Grammars of strangers are tried in a process of their own, with a deadline, before an engine hears of them.

The process is started by the first grammar. One that takes too long, or brings the process down, is refused, and the
process is ended; the next grammar starts another. Verdicts are remembered. Invariant: what ``check`` lets through has
compiled within the deadline, under the limits that engines have too.
"""

import asyncio
import contextlib
import hashlib
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import msgspec

from argosy.sampling_params import StructuredOutputsParams
from argosy.server.errors import ApiError, overloaded
from argosy.server.grammar_process import LENGTH_BYTES

MAX_WAITING = 64
_START_S = 60.0  # a tokenizer of 130,000 tokens takes two
_MAX_VERDICTS = 4096
_GOOD = ""


class Grammars(Protocol):
    """Of ``GrammarDoor``, what routes need."""

    async def check(self, structured: StructuredOutputsParams, param: str) -> None: ...


class GrammarDoor:
    """``tokenizer_directory``: with tokenizer.json; ``timeout_s``: for one grammar."""

    def __init__(self, tokenizer_directory: Path, timeout_s: float) -> None:
        self._tokenizer_directory = tokenizer_directory
        self._timeout_s = timeout_s
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # by hash: what is wrong with it
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._process: asyncio.subprocess.Process | None = None

    async def check(self, structured: StructuredOutputsParams, param: str) -> None:
        """Let a grammar pass.

        Raises:
            ApiError: 400 with ``param`` for one that cannot be compiled in time; 503 when too many wait.
        """
        data = msgspec.msgpack.encode(structured)
        key = hashlib.sha256(data).digest()
        if key not in self._verdicts:
            if self._num_waiting >= MAX_WAITING:
                raise overloaded(f"{MAX_WAITING} grammars wait to be compiled already; try again later")
            self._num_waiting += 1
            try:
                async with self._turn:
                    if key not in self._verdicts:
                        self._remember(key, await self._try(data))
            finally:
                self._num_waiting -= 1
        if (verdict := self._verdicts[key]) != _GOOD:
            raise ApiError(400, f"{param} cannot be compiled: {verdict}", param=param)

    async def aclose(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _remember(self, key: bytes, verdict: str) -> None:
        self._verdicts[key] = verdict
        if len(self._verdicts) > _MAX_VERDICTS:
            self._verdicts.popitem(last=False)

    async def _try(self, data: bytes) -> str:
        """What is wrong with a grammar; "" if nothing is."""
        try:
            process = await self._get_process()
        except (TimeoutError, OSError, EOFError) as error:
            await self.aclose()
            raise ApiError(503, f"the process that compiles grammars cannot start: {error}", retry_after_s=5) from error
        is_over = False
        try:
            async with asyncio.timeout(self._timeout_s):
                assert process.stdin is not None
                process.stdin.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
                await process.stdin.drain()
                verdict = msgspec.msgpack.decode(await _read(process), type=str | None)
            is_over = True
        except TimeoutError:
            return f"it takes longer than {self._timeout_s:g} s; make it smaller, or raise --grammar-timeout-s"
        except (EOFError, OSError):
            return "compiling it ended the compiler; make it smaller"
        finally:
            if not is_over:  # also if the client left meanwhile: what comes now would be taken for the next answer
                await self.aclose()
        return verdict or _GOOD

    async def _get_process(self) -> asyncio.subprocess.Process:
        if self._process is None:
            command = (sys.executable, "-m", "argosy.server.grammar_process", str(self._tokenizer_directory))
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(_START_S):
                    await _read(self._process)
            except BaseException:
                await self.aclose()
                raise
        return self._process


async def _read(process: asyncio.subprocess.Process) -> bytes:
    """Raises EOFError when the process is gone."""
    assert process.stdout is not None
    head = await process.stdout.readexactly(LENGTH_BYTES)
    return await process.stdout.readexactly(int.from_bytes(head, "big"))
