"""Migration from pypiserver: htpasswd files, options, addresses, folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import bcrypt
import pytest
from index_kit import Server, run_index, run_json, serving, wheel

from index.store.htpasswd import matches


def apr1(password: str) -> str:
    process = subprocess.run(["openssl", "passwd", "-apr1", password], check=True, capture_output=True, text=True)
    return process.stdout.strip()


def blow(password: str) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$")


USERS = {"ann": apr1("ann's"), "bob": blow("bob's"), "eve": blow("eve's"), "long": apr1("p" * 16)}
PASSWORDS = {"ann": "ann's", "bob": "bob's", "eve": "eve's", "long": "p" * 16}


def post(server: Server, user: str, password: str, version: str, path: str = "/") -> int:
    name, content = wheel("user_pkg", version)
    return server.client.post(
        path, data={":action": "file_upload"}, files={"content": (name, content)}, auth=(user, password)
    ).status_code


@pytest.fixture
def htpasswd(tmp_path: Path) -> Path:
    path = tmp_path / "htpasswd"
    path.write_text("# users\n" + "".join(f"{name}:{hashed}\n" for name, hashed in USERS.items()))
    return path


def test_users_of_an_htpasswd_file_upload_as_they_did(tmp_path: Path, htpasswd: Path) -> None:
    options = ["-i", "127.0.0.1", "-P", str(htpasswd), "-a", "update", "--disable-fallback", "--allow-new"]
    with serving(tmp_path / "root", *options) as server:
        for number, (name, password) in enumerate(PASSWORDS.items()):
            assert post(server, name, password, f"1.{number}") == 200, name
            assert post(server, name, password, f"1.{number}") == 200, "the second check uses the cache"
            assert post(server, name, password + "x", "9.0") == 401, name
        assert post(server, "stranger", "ann's", "9.0") == 401
        assert post(server, "ann", "", "9.0") == 401
        assert post(server, "eve", "nul\0byte", "9.0") == 401
        assert server.upload(*wheel("user_pkg", "2.0")).status_code == 200, "tokens still work"
        assert "token:ann" in run_index(server.root, "log").stdout
        assert len(server.filenames("user-pkg")) == len(USERS) + 1
        assert server.client.get("/simple/user-pkg/").status_code == 200, "reads are open"


def test_who_left_the_file_uploads_no_longer(shared: Server, htpasswd: Path) -> None:
    assert run_json(shared.root, "token", "import", str(htpasswd), "--project", "User.Pkg") == {"added": 4, "revoked": 0}
    assert run_json(shared.root, "token", "import", str(htpasswd)) == {"added": 0, "revoked": 0}
    assert post(shared, "bob", "bob's", "1.0") == 200
    htpasswd.write_text(f"bob:{apr1('new')}\neve:{USERS['eve']}\n")
    assert run_json(shared.root, "token", "import", str(htpasswd)) == {"added": 1, "revoked": 2}
    assert post(shared, "bob", "bob's", "1.1") == 401
    assert post(shared, "bob", "new", "1.1") == 200
    assert post(shared, "ann", "ann's", "1.2") == 401
    run_index(shared.root, "token", "revoke", "eve")
    assert post(shared, "eve", "eve's", "1.3") == 401


@pytest.mark.parametrize("line", ["ann:plain", "ann:$6$salt$hash", "no colon", ":$apr1$salt$hash"])
def test_hashes_that_cannot_be_checked_are_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "htpasswd"
    path.write_text(line + "\n")
    process = run_index(tmp_path / "root", "token", "import", str(path), check=False)
    assert process.returncode == 3
    assert "line 1" in process.stderr


def test_a_sha_1_password_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "htpasswd"
    path.write_text(f"ann:{apr1('x')}\nbob:{{SHA}}W6ph5Mm5Pz8GgiULbPgzG37mj9g=\n")
    for command in (("token", "import", str(path)), ("serve", "-p", "0", "-P", str(path))):
        process = run_index(tmp_path / "root", *command, check=False)
        assert process.returncode == 3
        assert "line 2: the password of bob is hashed with SHA-1" in process.stderr
        assert f"htpasswd -B {path} bob" in process.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    "hashed", ["$apr1$", "$apr1$salt", "$apr1$salt$short", "$apr1$muchtoolong$" + "a" * 22, "$2y$04$short"]
)
def test_a_damaged_hash_lets_nobody_in(hashed: str) -> None:
    assert not matches(b"x", hashed)


@pytest.mark.parametrize("asked", [".", "update,download", "list"])
def test_open_uploads_and_closed_reads_are_refused(tmp_path: Path, asked: str) -> None:
    process = run_index(tmp_path / "root", "serve", "-p", "0", "-a", asked, check=False)
    assert process.returncode == 3
    assert "always require a token" in process.stderr


def test_guessing_passwords_ends(tmp_path: Path, htpasswd: Path) -> None:
    with serving(tmp_path / "root", "-P", str(htpasswd), "--allow-new") as server:
        statuses = [post(server, "ann", f"guess {number}", "1.0") for number in range(40)]
        assert statuses[0] == 401
        assert statuses[-1] == 429
        assert post(server, "ann", "ann's", "1.0") == 429, "after too many guesses, even the right password is not computed"
        assert server.upload(*wheel("user_pkg", "1.0")).status_code == 200, "a token is cheap to check"
