"""The sandbox without a network: who tries is recorded and told, and the host is out of reach."""

from __future__ import annotations

import dataclasses
import socket
import textwrap
from pathlib import Path

import pytest

from builder.box import sandbox
from builder.box.sandbox import BindMount, Outcome
from tests.integration.sandbox.kit import PYTHON, User

TRY = """
    import socket, urllib.request
    def attempt(what):
        try: print(what())
        except OSError as error: print(type(error).__name__, error)
"""


def attempts(user: User, script: str, **options: object) -> Outcome:
    return user.python_run(textwrap.dedent(TRY) + textwrap.dedent(script), **options)


def test_a_name_is_recorded(user: User) -> None:
    outcome = attempts(user, "attempt(lambda: urllib.request.urlopen('http://example.org'))")
    assert outcome.reached == ("example.org",)
    assert outcome.network_by == "recorder"
    assert "Name or service not known" in user.text


def test_addresses_are_recorded_and_refused(user: User) -> None:
    outcome = attempts(
        user,
        """
        attempt(lambda: socket.create_connection(("93.184.216.34", 443)))
        attempt(lambda: socket.create_connection(("2001:db8::7", 80)))
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagram.connect(("192.0.2.1", 123))
        datagram.send(b"hello")
        """,
    )
    assert outcome.reached == ("93.184.216.34:443", "[2001:db8::7]:80", "192.0.2.1:123")
    assert user.text.count("ConnectionRefusedError") == 2


def test_each_attempt_is_recorded_once_in_order(user: User) -> None:
    outcome = attempts(
        user,
        """
        for name in ("b.example", "a.example", "b.example"):
            attempt(lambda: socket.getaddrinfo(name, 443))
            attempt(lambda: socket.create_connection(("192.0.2.7", 443)))
        """,
    )
    assert outcome.reached == ("b.example", "192.0.2.7:443", "a.example")


def test_an_attempt_right_before_the_end_is_recorded(me: User) -> None:
    for _ in range(10):
        script = "import os, socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9)); os._exit(0)"
        assert me.run(PYTHON, "-c", script).reached == ("192.0.2.1:9",)


def test_a_question_to_another_name_server_is_recorded(user: User) -> None:
    outcome = attempts(
        user,
        """
        import struct
        question = struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\\7example\\3org\\0" + struct.pack("!HH", 1, 1)
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.connect(("8.8.8.8", 53))
        server.send(question)
        attempt(lambda: server.recv(100))
        """,
    )
    assert outcome.reached == ("8.8.8.8:53", "example.org")
    assert "ConnectionRefusedError" in user.text


def test_questions_by_tcp_are_answered_and_garbage_survived(user: User) -> None:
    outcome = attempts(
        user,
        """
        import struct
        for address in (("127.0.0.1", 53), ("::1", 53)):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            socket.socket(family, socket.SOCK_DGRAM).sendto(b"\\xff" * 40, address)
            socket.create_connection(address).close()
            socket.create_connection(address).send(b"\\0")
            name = f"v{family}".encode()
            question = struct.pack("!6H", 1, 256, 1, 0, 0, 0) + bytes([len(name)]) + name + b"\\0" + struct.pack("!HH", 1, 1)
            stream = socket.create_connection(address)
            stream.send(struct.pack("!H", len(question)) + question)
            print("answer", stream.recv(1000)[5] & 15)
        attempt(lambda: socket.getaddrinfo("after.example", 1))
        """,
    )
    assert outcome.reached == ("v2", "v10", "after.example")
    assert user.text.count("answer 3") == 2


def test_own_names_and_loopback_are_legal_and_not_recorded(user: User) -> None:
    outcome = attempts(
        user,
        """
        import threading
        print(socket.getfqdn(), socket.gethostbyaddr("127.0.0.1")[0], socket.gethostbyname(socket.gethostname()))
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.9.9.9"), (socket.AF_INET6, "::1")):
            with socket.create_server((address, 0), family=family) as server:
                client = socket.create_connection(server.getsockname()[:2])
                client.send(b"over loopback")
                print(server.accept()[0].recv(100))
            with socket.socket(family, socket.SOCK_DGRAM) as one, socket.socket(family, socket.SOCK_DGRAM) as two:
                one.bind((address, 0))
                two.sendto(b"datagram", one.getsockname())
                print(one.recv(100))
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.connect(("192.0.2.1", 80))  # the usual way to learn one's own address sends nothing
        print("own address", own.getsockname()[0])
        """,
    )
    assert outcome.returncode == 0, user.text
    assert outcome.reached == ()
    assert user.text.count("b'over loopback'") == 3
    assert user.text.count("b'datagram'") == 3
    assert "own address 127.0.0.1" in user.text


def test_a_root_without_configuration_knows_its_own_names(me: User, tmp_path: Path) -> None:
    """Nothing in /etc: the C library asks 127.0.0.1, which is the recorder."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    for link in (entry for entry in Path("/").iterdir() if entry.is_symlink() and str(entry.readlink()).startswith("usr/")):
        (root / link.name).symlink_to(link.readlink())
    box = me.box(root=root)
    box = dataclasses.replace(box, mounts=(*box.mounts, BindMount(source=Path("/usr"), target="/usr")))
    outcome = attempts(
        me,
        """
        print(socket.gethostbyname("build"), socket.gethostbyname("localhost"), socket.getfqdn())
        attempt(lambda: socket.gethostbyname("other.example"))
        """,
        box=box,
    )
    assert me.text.startswith("127.0.0.1 127.0.0.1 "), me.text
    assert outcome.reached == ("other.example",)


def test_the_host_is_out_of_reach(user: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = attempts(user, f"attempt(lambda: socket.create_connection(('127.0.0.1', {port})))")
        assert "ConnectionRefusedError" in user.text
    assert outcome.reached == ()


def test_network_reaches_a_server_on_the_host_when_granted(user: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"socket.create_connection(('127.0.0.1', {port})).send(b'hello')"
        outcome = attempts(user, script, box=user.box(network=True))
        assert outcome.returncode == 0, user.text
        with server.accept()[0] as connection:
            assert connection.recv(10) == b"hello"
    assert outcome.network_by == "host"
    assert outcome.reached == ()


def test_without_a_recorder_the_output_tells(user: User) -> None:
    outcome = attempts(
        user,
        """
        attempt(lambda: urllib.request.urlopen("http://example.org"))
        attempt(lambda: socket.create_connection(("93.184.216.34", 443)))
        print("curl: (6) Could not resolve host: files.example")
        """,
        record=False,
    )
    assert outcome.network_by == "log"
    assert outcome.reached[-1] == "files.example"
    assert "Temporary failure in name resolution" in outcome.reached[0]
    assert "Network is unreachable" in outcome.reached[1]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("fatal: unable to access 'https://git.example/x/': Could not resolve host: git.example", "git.example"),
        ("HTTPSConnectionPool(host='files.example', port=443): ... Temporary failure in name resolution", "files.example"),
        (
            "wget: unable to resolve host address \u2018wget.example\u2019: Temporary failure in name resolution",
            "wget.example",
        ),
        ("  OSError: [Errno 101] Network is unreachable\n", "OSError: [Errno 101] Network is unreachable"),
        ("compiling network.cpp", None),
    ],
)
def test_what_well_known_programs_say(line: str, wanted: str | None) -> None:
    assert sandbox.reached_in(line) == wanted
