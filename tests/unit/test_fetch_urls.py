"""What people see of a URL, and what a client gets."""

from __future__ import annotations

import pytest

from builder.fetch.urls import same_host, shown, split_credentials, with_credentials


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://user:pass@host/a", "https://host/a"),
        ("cannot reach 'https://token@host:8/a', sorry", "cannot reach 'https://host:8/a', sorry"),
        ("https://user:p@ss@host/a", "https://host/a"),
        ("https://host/a?X-Amz-Signature=abc rest", "https://host/a?... rest"),
        ("ssh://git@host/a", "ssh://host/a"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://a:b@one/ and https://c:d@two/", "https://one/ and https://two/"),
    ],
)
def test_shown(text: str, wanted: str) -> None:
    assert shown(text) == wanted


def test_credentials_are_decoded_and_taken_out() -> None:
    assert split_credentials("https://us%40er:p%2Fw@host:8/a?b") == ("https://host:8/a?b", ("us@er", "p/w"))
    assert split_credentials("https://host/a@b") == ("https://host/a@b", None)
    assert split_credentials("ssh://git@host/a") == ("ssh://git@host/a", None)


def test_credentials_there_and_back() -> None:
    url = with_credentials("https://host/a", ("us@er", "p/w:x"))
    assert split_credentials(url) == ("https://host/a", ("us@er", "p/w:x"))


@pytest.mark.parametrize("other", ["http://host/", "https://host:444/", "https://host.evil/"])
def test_credentials_stay_with_their_host(other: str) -> None:
    assert same_host("https://host/simple/", "https://host/files/")
    assert not same_host("https://host/simple/", other)
