# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that tell of the machine and its kernel, or change what they do."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from .files import OpenFile, Steps, Wakeup
from .options import MisuseError, Program, guarded, options
from .processes import Process

if TYPE_CHECKING:
    from .drivers import NetDriver

__all__ = ["PROGRAMS"]

ADDRESS = "10.0.2.15"  # guest-kernel/init
ECHO_BYTES = 56
# Ethernet, IPv4 and ICMP headers (RFC 894, 791, 792)
ETHERNET, IPV4, ICMP = "!6s6sH", "!BBHHHBBH4s4s", "!BBHHH"
SECOND = 1_000_000_000


def _file(process: Process, path: str) -> Steps[str]:
    file: OpenFile = process.open(path)
    data = yield from process.all_of(file)
    file.drop()
    return data.decode(errors="replace")


def _uname(process: Process, arguments: list[str]) -> Steps[int]:
    """[-amnrspvio]"""
    chosen, _ = options(arguments, "amnrspvio")
    version = yield from _file(process, "/proc/version")
    release = version.split()[2]
    built = version[version.index("#") :].strip()
    values = {"s": "Linux", "n": process.userland.hostname, "r": release, "v": built,
              "m": "x86_64", "o": "GNU/Linux"}  # fmt: skip
    flags = set(values) if "a" in chosen else (chosen.flags - {"p", "i"}) or {"s"}
    yield from process.out(" ".join(values[f] for f in values if f in flags) + "\n")
    return 0


def _hostname(process: Process, arguments: list[str]) -> Steps[int]:
    """[-sidf] [HOSTNAME | -F FILE]"""
    _, names = options(arguments, "sidf", "F")
    if names:
        process.userland.hostname = names[0][:64]
        return 0
    yield from process.out(process.userland.hostname + "\n")
    return 0


def _uptime(process: Process, arguments: list[str]) -> Steps[int]:
    """"""
    userland = process.userland
    up = userland.nanoseconds // SECOND
    seconds = int(userland.time) % 86400
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    hours, minutes = up // 3600 % 24, up // 60 % 60
    days = f"{up // 86400} day{'s' if up >= 172800 else ''}, " if up >= 86400 else ""
    span = f"{hours:2}:{minutes:02}" if hours else f"{minutes} min"
    load = (yield from _file(process, "/proc/loadavg")).split()[:3]
    yield from process.out(
        f" {clock} up {days}{span},  0 users,  load average: {', '.join(load)}\n"
    )
    return 0


def _free(process: Process, arguments: list[str]) -> Steps[int]:
    """[-bkmgh]"""
    chosen, _ = options(arguments, "bkmgh")
    text = yield from _file(process, "/proc/meminfo")
    kib = {k: int(v) for k, v in re.findall(r"^(\S+):\s+(\d+) kB$", text, re.MULTILINE)}
    shift = 20 if "g" in chosen else 10 if "m" in chosen else 0

    def row(name: str, *values: int) -> str:
        shown = (value << 10 if "b" in chosen else value >> shift for value in values)
        return f"{name:<6}" + "".join(f"{value:13}"[-12:].rjust(12) for value in shown) + "\n"

    cached = kib["Buffers"] + kib["Cached"] + kib["SReclaimable"]
    used = kib["MemTotal"] - kib["MemFree"] - cached
    titles = ("total", "used", "free", "shared", "buff/cache", "available")
    yield from process.out(
        " " * 6 + "".join(f"{title:>12}" for title in titles) + "\n"
        + row("Mem:", kib["MemTotal"], used, kib["MemFree"], kib["Shmem"], cached,
              kib["MemAvailable"])
        + row("Swap:", 0, 0, 0)
    )  # fmt: skip
    return 0


def _ps(process: Process, arguments: list[str]) -> Steps[int]:
    """"""
    userland = process.userland
    rows = [
        (number, "[kthreadd]" if number == 2 else "[kworker]") for number in userland.kernel_threads
    ]
    rows += [(p.pid, p.name) for p in userland.processes.values()]
    lines = [f"{pid:5} root     {name}\n" for pid, name in sorted(rows)]
    yield from process.out("PID   USER     COMMAND\n" + "".join(lines))
    return 0


def _pidof(process: Process, arguments: list[str]) -> Steps[int]:
    """[NAME]..."""
    found = [str(p.pid) for p in process.userland.processes.values() if p.name in arguments]
    if found:
        yield from process.out(" ".join(reversed(found)) + "\n")
    return int(not found)


def _id(process: Process, arguments: list[str]) -> Steps[int]:
    """[-ugGnr] [USER]"""
    chosen, names = options(arguments, "ugGnr")
    if names and names[0] != "root":
        yield from process.error(f"id: unknown user {names[0]}")
        return 1
    text = "uid=0(root) gid=0(root) groups=0(root)"
    if chosen.flags & set("ugG"):
        text = "root" if "n" in chosen else "0"
    yield from process.out(text + "\n")
    return 0


def _whoami(process: Process, arguments: list[str]) -> Steps[int]:
    """"""
    yield from process.out("root\n")
    return 0


def _nproc(process: Process, arguments: list[str]) -> Steps[int]:
    """[--all] [--ignore=N]"""
    cpus = process.cpus if process.cpus is not None else process.kernel.online
    yield from process.out(f"{len(cpus)}\n")
    return 0


def _dmesg(process: Process, arguments: list[str]) -> Steps[int]:
    """[-cr] [-n LEVEL] [-s SIZE]"""
    chosen, _ = options(arguments, "crC", "ns")
    log = process.kernel.log
    if "n" not in chosen and "C" not in chosen:
        yield from process.out("".join(line + "\n" for line in log))
    if chosen.flags & {"c", "C"}:
        log.clear()
    return 0


def _reboot(process: Process, arguments: list[str]) -> Steps[int]:
    """[-d DELAY] [-nf]"""
    _chosen, _ = options(arguments, "nfwi", "d")
    machine = process.kernel.machine
    if process.name == "reboot":
        # The kernel's command line says reboot=t, and QEMU's says -no-reboot.
        machine.shutdown("guest-reset")
    elif process.name == "poweroff":
        machine.shutdown("guest-shutdown")
    yield from process.wait(Wakeup().wait())
    return 0


def _net(process: Process) -> NetDriver | None:
    """The driver of eth0."""
    return next(iter(process.kernel.network), None)


def _ifconfig(process: Process, arguments: list[str]) -> Steps[int]:
    """[-a] interface [address]"""
    names = [word for word in arguments if not word.startswith("-")]
    driver = _net(process)
    if (names and names[0] not in ("lo", "eth0")) or (names[:1] == ["eth0"] and driver is None):
        yield from process.error(f"ifconfig: {names[0]}: error fetching interface information: "
                                 "Device not found")  # fmt: skip
        return 1
    if len(names) > 1:
        if names[0] == "eth0":
            yield from process.userland.set_link(process, up="down" not in names[1:])
        return 0
    up = process.userland.network
    text = ""
    if driver is not None and (up or "-a" in arguments or names == ["eth0"]) and names != ["lo"]:
        mac = ":".join(f"{byte:02X}" for byte in driver.mac)
        flags = ("UP BROADCAST RUNNING MULTICAST" if process.userland.reachable
                 else "UP BROADCAST MULTICAST" if up else "BROADCAST MULTICAST")  # fmt: skip
        received, sent = driver.frames_in, driver.frames_out
        text += (
            f"eth0      Link encap:Ethernet  HWaddr {mac}  \n"
            f"          inet addr:{ADDRESS}  Bcast:10.0.2.255  Mask:255.255.255.0\n"
            f"          {flags}  MTU:1500  Metric:1\n"
            f"          RX packets:{received} errors:0 dropped:0 overruns:0 frame:0\n"
            f"          TX packets:{sent} errors:0 dropped:0 overruns:0 carrier:0\n"
            "          collisions:0 txqueuelen:1000 \n\n"
        )
    if names != ["eth0"]:
        text += (
            "lo        Link encap:Local Loopback  \n"
            "          inet addr:127.0.0.1  Mask:255.0.0.0\n"
            "          UP LOOPBACK RUNNING  MTU:65536  Metric:1\n\n"
        )
    yield from process.out(text)
    return 0


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo_request(mac: bytes, target: bytes, number: int) -> bytes:
    """An Ethernet frame that asks ``target`` for an answer."""
    body = bytes(ECHO_BYTES)
    icmp = struct.pack(ICMP, 8, 0, 0, 1, number & 0xFFFF) + body
    icmp = icmp[:2] + struct.pack("!H", _checksum(icmp)) + icmp[4:]
    source = bytes(map(int, ADDRESS.split(".")))
    header = struct.pack(
        IPV4, 0x45, 0, 20 + len(icmp), number & 0xFFFF, 0, 64, 1, 0, source, target
    )
    header = header[:10] + struct.pack("!H", _checksum(header)) + header[12:]
    return struct.pack(ETHERNET, b"\x52\x55\x0a\x00\x02\x02", mac, 0x0800) + header + icmp


def _ping(process: Process, arguments: list[str]) -> Steps[int]:
    """[OPTIONS] HOST"""
    chosen, names = options(arguments, "qA46", "cisWwIt")
    if len(names) != 1:
        raise MisuseError
    host = {"localhost": "127.0.0.1"}.get(names[0], names[0])
    octets = re.fullmatch(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})", host)
    if not octets or any(int(part) > 255 for part in octets.groups()):
        yield from process.error(f"ping: bad address '{names[0]}'")
        return 1
    count = chosen.value("c", "0")
    if not re.fullmatch(r"\d{1,9}", count):
        raise MisuseError(f"invalid number '{count}'")
    yield from process.out(f"PING {names[0]} ({host}): {ECHO_BYTES} data bytes\n")
    target = bytes(int(part) for part in octets.groups())
    sent = answered = 0
    while not int(count) or sent < int(count):
        if sent:
            yield from process.sleep(SECOND)
        before = process.kernel.now(process.vcpu)
        local = target[0] == 127 or host == ADDRESS
        came = local or (yield from _echo(process, target, sent))
        took = (process.kernel.now(process.vcpu) - before) / 1e6
        if came:
            answered += 1
            yield from process.out(
                f"{ECHO_BYTES + 8} bytes from {host}: seq={sent} ttl=64 time={took:.3f} ms\n"
            )
        sent += 1
    lost = 100 * (sent - answered) // sent if sent else 0
    yield from process.out(
        f"\n--- {names[0]} ping statistics ---\n{sent} packets transmitted, {answered} packets "
        f"received, {lost}% packet loss\n"
    )
    return int(not answered)


def _echo(process: Process, target: bytes, number: int) -> Steps[bool]:
    """Send one by eth0, whose other end sends back what it gets; whether it came."""
    driver = _net(process)
    if driver is None or not process.userland.reachable:
        yield from process.sleep(SECOND)
        return False
    frame = echo_request(driver.mac, target, number)
    arrived = Wakeup()
    seen = False

    def received(vcpu: object, data: bytes) -> None:
        nonlocal seen
        seen = seen or data == frame
        arrived.wake()

    driver.received = received
    wait = arrived.wait()
    process.kernel.machine.events.after(2 * SECOND, wait.wake)  # 1 s at 2 GHz
    if driver.send(process.vcpu, frame):
        yield from process.wait(wait)
    driver.received = None
    return seen


def _mount(process: Process, arguments: list[str]) -> Steps[int]:
    """[OPTIONS] [-o OPT] DEVICE NODE"""
    if arguments:
        yield from process.error(f"mount: mounting {' on '.join(arguments[-2:])} failed: "
                                 "Operation not permitted")  # fmt: skip
        return 255
    for line in (yield from _file(process, "/proc/mounts")).splitlines():
        device, place, kind, how = line.split()[:4]
        yield from process.out(f"{device} on {place} type {kind} ({how})\n")
    return 0


def _df(process: Process, arguments: list[str]) -> Steps[int]:
    """[-PkmhTai] [FILESYSTEM]..."""
    options(arguments, "PkmhTai")
    room = process.userland.room
    total, free = room.size >> 10, room.free >> 10
    yield from process.out(
        "Filesystem           1K-blocks      Used Available Use% Mounted on\n"
        f"tmp                 {total:10} {total - free:9} {free:9} "
        f"{100 * (total - free) // max(1, total):3}% /tmp\n"
    )
    return 0


def _devmem(process: Process, arguments: list[str]) -> Steps[int]:
    """ADDRESS [WIDTH [VALUE]]"""
    if not 1 <= len(arguments) <= 3:
        raise MisuseError
    try:
        address = int(arguments[0], 0)
        width = (
            {"b": 8, "h": 16, "w": 32, "l": 64}.get(arguments[1].lower())
            if len(arguments) > 1
            else 32
        )
        width = width or int(arguments[1], 0)
        value = int(arguments[2], 0) if len(arguments) > 2 else None
    except ValueError:
        raise MisuseError(f"invalid number '{arguments[-1]}'") from None
    size = width // 8
    if width not in (8, 16, 32, 64) or not 0 <= address < 1 << 52:
        raise MisuseError
    if address % size:
        yield from process.error("devmem: unaligned address")
        return 1
    vcpu = process.vcpu
    if value is not None:
        vcpu.write(address, size, value & ((1 << width) - 1))
    else:
        yield from process.out(f"0x{vcpu.read(address, size):0{size * 2}X}\n")
    return 0


PROGRAMS: dict[str, Program] = {
    name: guarded(program)
    for name, program in {
        "uname": _uname, "hostname": _hostname, "uptime": _uptime, "free": _free, "ps": _ps,
        "pidof": _pidof, "id": _id, "whoami": _whoami, "nproc": _nproc, "dmesg": _dmesg,
        "reboot": _reboot, "poweroff": _reboot, "halt": _reboot, "ifconfig": _ifconfig,
        "ping": _ping, "mount": _mount, "df": _df, "devmem": _devmem,
    }.items()
}  # fmt: skip
