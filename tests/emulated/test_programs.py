# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's programs, as busybox's and guest-kernel/load.c's answer in a real guest."""

from __future__ import annotations

import json

import pytest

from .userland import Guest

TEXT = "one 1\ntwo 2\nthree 3\ntwo 4\n"


@pytest.fixture(scope="module")
def guest() -> Guest:
    return Guest("msi", smp=4, queues=4)


SAID = [
    ("cat", TEXT),
    ("head -n2 | tail -n 1", "two 2\n"),
    ("head -c 3", "one"),
    ("tail -c 4", "o 4\n"),
    ("tail -n +4", "two 4\n"),
    ("wc -l", "4\n"),
    ("wc", "        4         8        26\n"),
    ("grep two", "two 2\ntwo 4\n"),
    ("grep -c two; true", "2\n"),
    ("grep -n -w -v -e one -e two", "3:three 3\n"),
    ("grep -o '[0-9]' | tr '\\n' ,", "1,2,3,4,"),
    ("grep -E '^(one|three) [13]$'", "one 1\nthree 3\n"),
    ("grep 'o\\{1\\}ne\\|x'", "one 1\n"),
    ("grep -q two && echo y", "y\n"),
    ("sed 's/\\(.*\\) \\(.\\)/\\2-\\1/'", "1-one\n2-two\n3-three\n4-two\n"),
    ("sed -n '2p;$p'", "two 2\ntwo 4\n"),
    ("sed -e /two/d -e 's/o/0/g'", "0ne 1\nthree 3\n"),
    ("sed '2,3d;s/t/T/2'", "one 1\ntwo 4\n"),
    ("sed -n '/two/,/three/p'", "two 2\nthree 3\ntwo 4\n"),
    ("sed 's/:.*//;q'", "one 1\n"),
    ("cut -d' ' -f2 | tr -d '\\n'", "1234"),
    ("cut -c1-3", "one\ntwo\nthr\ntwo\n"),
    ("tr a-z A-Z | head -n 1", "ONE 1\n"),
    ("sort", "one 1\nthree 3\ntwo 2\ntwo 4\n"),
    ("sort -k2 -n -r | cut -d' ' -f2 | tr -d '\\n'", "4321"),
    ("cut -d' ' -f1 | sort | uniq -c", "      1 one\n      1 three\n      2 two\n"),
    ("tee /tmp/t | wc -l; wc -l < /tmp/t", "4\n4\n"),
    ("hexdump -v -e '1/1 \"%02x\"' | cut -c1-8", "6f6e6520\n"),
    ("hexdump -C | head -n1",
     "00000000  6f 6e 65 20 31 0a 74 77  6f 20 32 0a 74 68 72 65  |one 1.two 2.thre|\n"),
    ("xargs -n 4 echo", "one 1 two 2\nthree 3 two 4\n"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "said"), SAID, ids=[row[0] for row in SAID])
def test_programs_that_read_text(guest: Guest, command: str, said: str) -> None:
    assert guest.run(command, stdin=TEXT.encode()).stdout == said


PLAIN = [
    ("printf '%d %s|%5.2f|%x\\n' 3 a 2.5 255; printf '%s\\n' a b", "3 a| 2.50|ff\na\nb\n"),
    ("echo -e 'a\\tb\\c'; echo -n x; echo -E '\\t'", "a\tbx\\t\n"),
    ("seq 3 | tr '\\n' ' '; seq -w 8 2 12; seq 2 -1 1", "1 2 3 08\n10\n12\n2\n1\n"),
    ("basename /a/b.c .c; dirname /a/b; dirname x", "b\n/a\n.\n"),
    ("readlink -f /sys/block/vda/..", "/sys/devices/platform/LNRO0005:00/virtio0/block\n"),
    ("readlink /sys/bus/virtio/devices/virtio0",
     "../../../devices/platform/LNRO0005:00/virtio0\n"),
    ("mkdir -p /tmp/a/b; touch /tmp/a/f; ls /tmp/a; find /tmp/a -type f; rm -r /tmp/a",
     "b\nf\n/tmp/a/f\n"),
    ("echo x > /tmp/f; cp /tmp/f /tmp/g; mv /tmp/g /tmp/h; cat /tmp/h; ls /tmp/g; rm /tmp/h",
     "x\n"),
    ("ln -s /etc/passwd /tmp/l; cat /tmp/l; ls -l /tmp/l | sed 's/.* -> //'; rm /tmp/l",
     "root:x:0:0:root:/root:/bin/sh\n/etc/passwd\n"),
    ("echo a b > /tmp/f; sed -i s/a/c/ /tmp/f; cat /tmp/f", "c b\n"),
    ("dd if=/dev/zero bs=512 count=3 2> /dev/null | wc -c", "1536\n"),
    ("dd if=/dev/vda bs=4096 count=2 skip=1 2> /dev/null | wc -c", "8192\n"),
    ("dd if=/dev/urandom of=/dev/vda bs=700 count=3 seek=1; head -c 100 /dev/vda | wc -c",
     "100\n"),
    ("head -c 4 /dev/urandom | wc -c; cat /dev/hwrng | head -c 100 | wc -c", "4\n100\n"),
    ("nproc; taskset -c 1,3 nproc; taskset 2 sh -c 'taskset -p $$ | sed s/.*mask//'",
     "4\n2\n: 2\n"),
    ("id; whoami; hostname; uname; uname -m",
     "uid=0(root) gid=0(root) groups=0(root)\nroot\nvm1\nLinux\nx86_64\n"),
    ("env -i A=1 env; expr 3 + 4; which ls", "A=1\n7\n/bin/ls\n"),
    ("sleep 30 & kill $!; wait $!; echo $?", "143\n"),
    ("timeout 0.01 sleep 30; echo $?", "143\n"),
    ("usleep 1000; sleep 0.01s; echo $?", "0\n"),
    ("ping -c 1 127.0.0.1 | grep -c 'seq=0'; ping -c 2 10.0.2.2 | grep -c bytes\\ from", "1\n2\n"),
    ("busybox echo x; busybox nope 2>&1; echo $?", "x\nnope: applet not found\n127\n"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "said"), PLAIN, ids=[row[0][:50] for row in PLAIN])
def test_other_programs(guest: Guest, command: str, said: str) -> None:
    assert guest.run(command).stdout == said


COMPLAINS = [
    ("cat /nope", "cat: can't open '/nope': No such file or directory", 1),
    ("cat /proc", "cat: read error: Is a directory", 1),
    ("ls /nope", "ls: /nope: No such file or directory", 1),
    ("rm /nope", "rm: can't remove '/nope': No such file or directory", 1),
    ("rm /tmp", "rm: '/tmp' is a directory", 1),
    ("mkdir /tmp", "mkdir: can't create directory '/tmp': File exists", 1),
    ("mv /nope /tmp", "mv: can't rename '/nope': No such file or directory", 1),
    ("cp /nope /tmp", "cp: can't stat '/nope': No such file or directory", 1),
    ("grep x /nope", "grep: /nope: No such file or directory", 2),
    ("sleep x", "sleep: invalid number 'x'", 1),
    ("usleep x", "usleep: invalid number 'x'", 1),
    ("dd if=/nope", "dd: can't open '/nope': No such file or directory", 1),
    ("taskset -c 77 true", "taskset: can't set pid 0's affinity: Invalid argument", 1),
    ("awk 1", "sh: awk: not found", 127),
    ("top", "sh: top: not found", 127),
    ("touch /sys/x", "touch: /sys/x: Operation not permitted", 1),
]


@pytest.mark.parametrize(("command", "said", "status"), COMPLAINS, ids=[c[0] for c in COMPLAINS])
def test_programs_refuse_in_busyboxs_words(
    guest: Guest, command: str, said: str, status: int
) -> None:
    done = guest.run(command, check=False)
    assert (done.stderr.strip(), done.status) == (said, status)


def test_load_completes_what_it_is_asked_for(guest: Guest) -> None:
    """COUNT completions on the CPU's own queue are COUNT interrupts of its vector."""

    def counts() -> list[int]:
        row = guest.run("grep req.2 /proc/interrupts").stdout.split()
        return [int(word) for word in row[1:5]]

    before = counts()
    said = json.loads(guest.run("qvis-load /dev/vda 2 500").stdout)
    guest_ns = said.pop("guest_ns")
    assert said == {"device": "/dev/vda", "cpu": 2, "completed": 500}
    assert guest_ns > 0
    assert [b - a for a, b in zip(before, counts(), strict=True)] == [0, 0, 500, 0]
    guest.run("qvis-load /sys/block/vda/serial 2 10; cat /sys/block/vda/serial")
    assert sum(counts()) - sum(before) >= 510


LOAD_REFUSES = [
    ("", "usage: qvis-load DEVICE CPU COUNT", 2),
    ("/dev/vda 99 3", "qvis-load: cannot run on CPU 99: Invalid argument", 2),
    ("/dev/vda x 3", "qvis-load: CPU must be a number, not 'x'", 2),
    ("/dev/vda 1 -3", "qvis-load: COUNT must be a number, not '-3'", 2),
    ("/dev/nope 0 3", "qvis-load: cannot open /dev/nope: No such file or directory", 2),
    ("/etc 1 5", "qvis-load: cannot read /etc: Is a directory", 1),
]


@pytest.mark.parametrize(("arguments", "said", "status"), LOAD_REFUSES)
def test_load_refuses_as_the_real_one(guest: Guest, arguments: str, said: str, status: int) -> None:
    done = guest.run(f"qvis-load {arguments}", check=False)
    assert (done.stderr.strip(), done.status, done.stdout) == (said, status, "")


def test_loads_on_two_queues_go_on_side_by_side(guest: Guest) -> None:
    said = guest.run("qvis-load /dev/vda 0 150 & qvis-load /dev/vda 3 150; wait").stdout
    assert [json.loads(line)["completed"] for line in said.splitlines()] == [150, 150]


def test_reboot_switches_the_machine_off() -> None:
    guest = Guest(smp=1, queues=1)
    told: list[tuple[str, object]] = []
    guest.machine.on_event.append(lambda event, data: told.append((event, data["reason"])))
    guest.start("(sleep 0.2; reboot -f) > /dev/null 2>&1 &")
    guest.until(lambda: guest.machine.status == "shutdown")
    assert told == [("SHUTDOWN", "guest-reset")]


def test_what_printf_pads_is_not_cut(guest: Guest) -> None:
    assert guest.run("printf '%5000s' x | wc -c").stdout == "5000\n"
    assert guest.run("printf '%*s' -5000 x | wc -c").stdout == "5000\n"
    for form in ("%999999999999s", "%.999999999d", "%4000000s%4000000s%4000000s"):
        done = guest.run(f"printf {form} 1 | wc -c", check=False)
        assert (done.stdout, "Cannot allocate memory" in done.stderr) == ("0\n", True)


def test_who_reads_too_much_ends_and_so_do_its_writers(guest: Guest) -> None:
    said = guest.run("cat /dev/zero | sort | wc -c")
    assert (said.stdout, "sort: read error: Cannot" in said.stderr) == ("0\n", True)
    said = guest.run("yes | tr -d '\\n' | grep x", check=False)
    assert (said.stderr, said.status) == ("grep: out of memory\n", 1)


def test_tail_keeps_no_more_than_it_shows(guest: Guest) -> None:
    assert guest.run("head -c 20000000 /dev/zero | tail -c 10 | wc -c").stdout == "10\n"
    assert guest.run("yes | head -c 9000000 | tail -n 3").stdout == "y\n" * 3
    assert guest.run("seq 1 100000 | tail -n 2").stdout == "99999\n100000\n"
    assert guest.run("seq 1 9 | tail -n 0; seq 1 9 | tail -c +17").stdout == "9\n"
    done = guest.run("cat /dev/zero | tail -n 1", check=False)
    assert done.stderr == "tail: read error: Cannot allocate memory\n"


def test_a_reset_starts_over() -> None:
    guest = Guest(smp=2, queues=2)
    guest.run("echo x > /tmp/there")
    lost: list[bool] = []
    guest.userland.on_lost.append(lambda: lost.append(True))
    process, _, _ = guest.start("sleep 1000")
    guest.console.clear()
    guest.machine.reset()
    guest.until(lambda: b"/ # " in guest.console)
    assert lost == [True]
    assert guest.run("ls /tmp").stdout == ""
    assert guest.run("qvis-load /dev/vda 1 10").status == 0
    del process


def test_devmem_reads_registers(guest: Guest) -> None:
    base = next(iter(guest.machine.devices.values())).start
    assert guest.run(f"devmem {base:#x} 32").stdout == "0x74726976\n"
    assert guest.run("devmem 0x1000 32 0x12345678; devmem 0x1000 8").stdout == "0x78\n"
