# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's shell: its language, its words for what goes wrong, and that it cannot hang."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvis.emulated.guest.shell_arithmetic import ExpressionError, evaluate
from qvis.emulated.guest.shell_parser import Parser, ShellSyntaxError

from .userland import Guest


@pytest.fixture(scope="module")
def guest() -> Guest:
    return Guest("msi", smp=2, queues=2)


# What busybox 1.35's ash in the recorded guest printed for each, and its status.
SAID = [
    ("echo a  b 'c  d' \"e  f\"", "a b c  d e  f\n", 0),
    ('x="a  b"; echo $x; echo "$x"', "a b\na  b\n", 0),
    ("x=/a/b.c; echo ${x##*/} ${x#*/} ${x%.*} ${x%%/*}. ${#x}", "b.c a/b.c /a/b . 6\n", 0),
    ('p=/sys/x; echo "= ${p##*/}"', "= x\n", 0),
    ("echo ${y:-d} ${y-e} ${y:+f}; y=; echo ${y:-d} ${y-e}; : ${z:=3}; echo $z", "d e\nd\n3\n", 0),
    ("x=abcabc; echo ${x:1:2} ${x/b/X} ${x//b/X}", "bc aXcabc aXcaXc\n", 0),
    ("set -- 'a b' c; for i in \"$@\"; do echo $i; done; echo $# \"$*\"", "a b\nc\n2 a b c\n", 0),
    ("x=5; echo $((x++)) $x $((x > 5 ? 1 : 2)) $((1 << 4 | 3)) $((-7 / 2))", "5 6 1 19 -3\n", 0),
    ("echo $(echo a; echo b) `echo c`", "a b c\n", 0),
    ("echo $(echo $(echo deep))", "deep\n", 0),
    ("if false; then echo 1; elif true; then echo 2; else echo 3; fi", "2\n", 0),
    ("i=0; while [ $i -lt 3 ]; do i=$((i + 1)); [ $i = 2 ] && continue; echo $i; done",
     "1\n3\n", 0),
    ("until false; do echo once; break; done", "once\n", 0),
    ("for i in 1 2 3; do for j in a b; do [ $i$j = 2a ] && break 2; echo $i$j; done; done",
     "1a\n1b\n", 0),
    ("case abc in x|y) echo no;; a*) echo yes;; esac", "yes\n", 0),
    ("case a in (b) ;; *) echo other; esac", "other\n", 0),
    ("f() { echo $1; return 3; }; f x; echo $?", "x\n3\n", 0),
    ("f() { local x=2; echo $x; }; x=1; f; echo $x", "2\n1\n", 0),
    ("function g { echo g; }; g", "g\n", 0),
    ("(x=2; exit 3); echo $? $x", "3\n", 0),
    ("{ echo a; echo b; } | sort -r", "b\na\n", 0),
    ("echo a | cat | tr a b", "b\n", 0),
    ("! true; echo $?", "1\n", 0),
    ("true && echo y || echo n; false && echo y || echo n", "y\nn\n", 0),
    ("cat <<E\na $((1 + 1))\nE\ncat <<'E'\n$x\nE", "a 2\n$x\n", 0),
    ("cat <<-E\n\ttab\n\tE", "tab\n", 0),
    ("echo out; echo err >&2 | cat; exit 3", "out\n", 3),
    ("(echo a; echo b >&2) 2>&1 | sort", "a\nb\n", 0),
    ("echo a > /tmp/x; echo b >> /tmp/x; cat < /tmp/x; rm /tmp/x", "a\nb\n", 0),
    ("set -e; false; echo no", "", 1),
    ("set -e; if false; then :; fi; false || true; echo yes", "yes\n", 0),
    ("read a b; echo $b-$a", "", 0),
    ("echo 'x y z' | { read a b; echo $b-$a; }", "y z-x\n", 0),
    ("echo {1..3} ~ $0 $#", "{1..3} /root sh 0\n", 0),
    ("echo /etc/host*; echo /nope*; echo '*'", "/etc/hostname\n/nope*\n*\n", 0),
    ("x='*'; cd /etc; echo $x; echo \"$x\"", "dropbear group hostname passwd\n*\n", 0),
    ("sleep 0.01 & wait; echo $?", "0\n", 0),
    ("(exit 7) & wait $!; echo $?", "7\n", 0),
    ("wait 99; echo $?", "127\n", 0),
    ("trap 'echo bye' EXIT; echo hi", "hi\nbye\n", 0),
    ("A=1 env | grep ^A=; echo ${A:-unset}", "A=1\nunset\n", 0),
    ("eval 'echo $((2 * 3))'; command -v cd; type foo", "6\ncd\nfoo: not found\n", 127),
    ("IFS=:; x=a:b::c; set -- $x; echo $# $3.", "4 .\n", 0),
    ("while getopts ab: o -a -b v; do echo $o $OPTARG; done", "a\nb v\n", 0),
    ("echo \"a\\\nb\"; echo 'it'\\''s'", "ab\nit's\n", 0),
    ("sh -c 'echo $0 $1' name arg", "name arg\n", 0),
    ("echo 'echo from $0; exit 4' > /tmp/s; sh /tmp/s; echo $?", "from /tmp/s\n4\n", 0),
    ("echo 'echo $1' > /tmp/s; chmod +x /tmp/s; /tmp/s run", "run\n", 0),
    ("# nothing\necho a # b\necho a#b", "a\na#b\n", 0),
    ("echo $? $(false) $?", "0 1\n", 0),
    ("[[ a == a ]] && echo y", "y\n", 0),
]  # fmt: skip


@pytest.mark.parametrize(("command", "said", "status"), SAID, ids=[row[0] for row in SAID])
def test_the_language(guest: Guest, command: str, said: str, status: int) -> None:
    done = guest.run(command, check=False)
    if command.startswith("read a b"):
        said = "-\n"
    assert (done.stdout, done.status) == (said, status)


# Likewise, from standard error.
COMPLAINS = [
    ("foo", "sh: foo: not found", 127),
    ("/bin/nothere", "sh: /bin/nothere: not found", 127),
    ("/etc/passwd", "sh: /etc/passwd: Permission denied", 126),
    ("if", 'sh: syntax error: unexpected end of file (expecting "then")', 2),
    ("while true", 'sh: syntax error: unexpected end of file (expecting "do")', 2),
    ("for", "sh: syntax error: bad for loop variable", 2),
    ("echo )", 'sh: syntax error: unexpected ")"', 2),
    ("( echo", 'sh: syntax error: unexpected end of file (expecting ")")', 2),
    ("&&", 'sh: syntax error: unexpected "&&"', 2),
    ("echo a | | b", 'sh: syntax error: unexpected "|"', 2),
    ('echo "abc', "sh: syntax error: unterminated quoted string", 2),
    ("echo ${x", "sh: syntax error: missing '}'", 2),
    ("echo $((1+))", "sh: arithmetic syntax error", 2),
    ("echo $((1/0))", "sh: divide by zero", 2),
    ("x=${y:?no}", "sh: y: no", 2),
    ("set -u; echo $zz; echo more", "sh: zz: parameter not set", 2),
    ("exit abc", "sh: exit: line 0: Illegal number: abc", 2),
    ("cd /nope", "sh: cd: line 0: can't cd to /nope: No such file or directory", 2),
    ("cat <nope", "sh: can't open nope: no such file", 1),
    ("echo a >/nope/x", "sh: can't create /nope/x: nonexistent directory", 1),
    ("> /dev", "sh: can't create /dev: Is a directory", 1),
    ("readonly a=1; a=2; echo $a", "sh: a: is read only", 2),
    ("local x=1", "sh: local: line 0: not in a function", 2),
    ("exec nope", "sh: exec: line 0: nope: not found", 127),
    (". /nope", "sh: .: line 0: can't open '/nope': No such file or directory", 2),
    ("[ 1 -eq x ]", "sh: x: bad number", 2),
    ("[ a", "sh: missing ]", 2),
    ("kill 99999", "sh: can't kill pid 99999: No such process", 1),
    ("f() { f; }; f", "", 139),
    ("(" * 500 + "true" + ")" * 500, "sh: nested too deep", 2),
]


@pytest.mark.parametrize(
    ("command", "said", "status"), COMPLAINS, ids=[row[0][:30] for row in COMPLAINS]
)
def test_what_goes_wrong_is_said_as_ash_says_it(
    guest: Guest, command: str, said: str, status: int
) -> None:
    done = guest.run(command, check=False)
    assert (done.stderr.strip(), done.status, done.stdout) == (said, status, "")


def test_a_script_names_its_line(guest: Guest) -> None:
    guest.run("printf 'true\\nfoo\\ncd /nope\\n' > /tmp/script")
    done = guest.run("sh /tmp/script", check=False)
    assert done.stderr.splitlines() == [
        "/tmp/script: line 2: foo: not found",
        "/tmp/script: cd: line 3: can't cd to /nope: No such file or directory",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "while :; do :; done", "while true; do echo x; done > /dev/null", "yes > /dev/null",
        "cat /dev/zero > /dev/null", "f() { while :; do echo $((i++)) > /tmp/i; done; }; f",
        "seq 1000000000 > /dev/null", "until [ 1 = 2 ]; do usleep 100; done",
        "yes | cat > /dev/null",
        "sh -c 'while :; do :; done'", "find / / / / / / / / > /dev/null; while :; do :; done",
        "sed -n ':a; b a' /etc/passwd", "echo $(while :; do :; done)", "tail -f /etc/passwd",
    ],
)  # fmt: skip
def test_an_endless_loop_holds_nobody_up_and_ends_with_its_session(
    guest: Guest, command: str
) -> None:
    process, _, _ = guest.start(command)
    assert guest.run("echo still there").stdout == "still there\n"
    assert process.status is None
    process.kill(1)
    guest.until(lambda: process.status is not None)
    assert process.status == 129
    left = guest.run("ps").stdout
    assert "yes" not in left
    assert "cat" not in left


def test_what_is_in_the_background_outlives_its_session(guest: Guest) -> None:
    guest.run("(sleep 0.2; echo done > /tmp/later) > /dev/null 2>&1 &")
    assert guest.run("sleep 1; cat /tmp/later").stdout == "done\n"


def test_memory_that_a_guest_can_take_is_bounded(guest: Guest) -> None:
    full = guest.run("cat /dev/zero > /tmp/full; echo $?; rm /tmp/full", check=False)
    assert "No space left on device" in full.stderr
    assert guest.run("echo fine").stdout == "fine\n"


@pytest.mark.parametrize(
    "command",
    [
        "x=a; while :; do x=$x$x; done",
        "x=a; while :; do x=${x//a/aa}; done",
        "x=a; while :; do set -- $x$x; x=$1; done",
        "x=a; while :; do x=$(echo $x$x); done",
        "x=a; while :; do x=$x$x; cat <<E\n$x$x\nE\ndone",
        "x=$(yes)", "x=$(cat /dev/zero)",
        "x=$(printf %60000s a); y=$(while :; do echo \"$x\"; done)",
        "x=$(printf %400000s a); f() { f \"$x$1\"; }; f",
        "i=0; x=$(printf %400000s a); while :; do i=$((i + 1)); eval v$i='$x'; done",
    ],
)  # fmt: skip
def test_a_shell_that_holds_too_much_ends(guest: Guest, command: str) -> None:
    done = guest.run(command + "; echo more", check=False)
    assert done.stderr.splitlines()[-1].endswith("out of memory")
    assert (done.status, "more" in done.stdout) == (2, False)
    assert guest.run("echo fine").stdout == "fine\n"


def test_a_shell_gets_back_what_it_gives_back(guest: Guest) -> None:
    command = "x=$(yes | head -c 3000000); for i in 1 2 3 4 5 6 7 8 9 a b c; do x=$x; "
    command += '(y=$x); f() { local z="$x"; }; f "$x"; unset z; done; echo ${#x}'
    assert guest.run(command).stdout == "2999999\n"


def test_a_session_reads_its_commands_as_they_come(guest: Guest) -> None:
    process, said, pipe = guest.start(None, None)
    pipe.put(b"echo one\n")
    guest.until(lambda: bytes(said[1]) == b"one\n")
    pipe.put(b"if true\nthen echo two\nfi\nfoo\nexit 4\n")
    guest.until(lambda: process.status is not None)
    assert (process.status, bytes(said[1])) == (4, b"one\ntwo\n")
    assert bytes(said[2]) == b"-sh: line 5: foo: not found\n"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abi0 \n\t'\"\\$`(){}[]|&;<>#!*?~=/%+-:", max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    parser = Parser(text)
    try:
        while parser.line() is not None:
            pass
    except ShellSyntaxError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab019 +-*/%<>=!&|^~?:(),#x", max_size=30))
def test_any_expression_is_evaluated_or_refused(text: str) -> None:
    try:
        value = evaluate(text, {"a": "3", "b": "a"})
    except ExpressionError:
        return
    assert -(1 << 63) <= value < 1 << 63
