# SPDX-License-Identifier: GPL-2.0-or-later
"""An emulated machine with its QMP server in a thread, and a client that sees every byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.machine import Machine
from qvis.emulated.serve.qmp import QmpServer
from qvis.transport import Transport

DEVICES = (
    DeviceSpec("blk", "blk0", 2),
    DeviceSpec("net", "nic0"),
    DeviceSpec("rng", "random0"),
)
SSH_PORT = 2222
DEADLINE = 20  # seconds until a client gives up
T = TypeVar("T")


class Served:
    """A machine that is reached by QMP, on an event loop in a thread of its own."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.sockets = [folder / f"qmp{number}.sock" for number in range(2)]
        self.machine = Machine(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.run(self._start)

    async def _start(self) -> QmpServer:
        server = QmpServer(self.machine, self.sockets, name="qvis-fake", ssh_port=lambda: SSH_PORT)
        await server.start()
        return server

    def run(self, work: Callable[[], Any]) -> Any:
        """Have the loop's thread do ``work``, a coroutine function, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(DEADLINE)

    def do(self, work: Callable[[], T]) -> T:
        """The same for a plain function."""

        async def once() -> T:
            return work()

        return self.run(once)  # type: ignore[no-any-return]

    def boot(self) -> None:
        """Have the guest come up; from then on the machine stands still."""

        def run() -> bool:
            finished: list[bool] = []
            kernel = Kernel(self.machine)
            self.machine.guest = kernel
            kernel.boot(lambda: finished.append(True))
            while not finished and self.machine.run_slice(1):
                pass
            return bool(finished)

        assert self.do(run)

    def close(self) -> None:
        self.run(self.server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()


@contextlib.contextmanager
def serve(
    folder: Path, transport: Transport = Transport.MSI, *, smp: int = 2, memory: int = 64
) -> Iterator[Served]:
    """A machine of so many vCPUs and MiB, with its sockets in ``folder``."""
    served = Served(folder, Config(transport=transport, smp=smp, memory=memory, devices=DEVICES))
    try:
        yield served
    finally:
        served.close()


class Client:
    """A QMP client without opinions: bytes out, lines in."""

    def __init__(self, path: Path, *, negotiate: bool = True, oob: bool = False) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))  # waits while others do; with a timeout it would not
        self.socket.settimeout(DEADLINE)
        self._file = self.socket.makefile("rb")
        self.greeting = self.read()
        self.events: list[dict[str, Any]] = []
        if negotiate:
            capabilities = {"enable": ["oob"]} if oob else {}
            assert self.request("qmp_capabilities", **capabilities) == {"return": {}}

    def send(self, data: bytes | str) -> None:
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def read(self) -> dict[str, Any]:
        """The next message, whatever it is; EOFError when there will be none."""
        line = self._file.readline()
        if not line:
            raise EOFError
        return dict(json.loads(line))

    def answer(self) -> dict[str, Any]:
        """The next message that is no event; events go to :attr:`events`."""
        while "event" in (message := self.read()):
            self.events.append(message)
        return message

    def event(self, name: str) -> dict[str, Any]:
        """The next event of that name, which may have come already."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            message = self.read()
            assert "event" in message, message
            self.events.append(message)

    def request(self, command: str, /, **arguments: Any) -> dict[str, Any]:
        """The whole answer to a command; dashes in names of arguments as underscores not."""
        self.send(json.dumps({"execute": command, "arguments": arguments}))
        return self.answer()

    def __call__(self, command: str, /, **arguments: Any) -> Any:
        """What a command returned."""
        answer = self.request(command, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    def error(self, command: str, /, **arguments: Any) -> tuple[str, str]:
        """Class and words of the error that a command ends in."""
        answer = self.request(command, **arguments)
        assert "error" in answer, answer
        return answer["error"]["class"], answer["error"]["desc"]

    def monitor(self, line: str) -> str:
        """What the human monitor says, without the returns of its line ends."""
        text = str(self("human-monitor-command", **{"command-line": line}))
        return text.replace("\r\n", "\n")

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
