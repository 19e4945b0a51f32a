"""A registry whose token server answers with something else."""

from __future__ import annotations

import httpx
import pytest

from builder.fetch import registry
from gracefarm.errors import FetchError


@pytest.mark.parametrize("body", ["<html>log in to the wireless</html>", "[1, 2]", "7"])
def test_a_token_answer_that_is_no_object_is_one_sentence(body: str) -> None:
    with (
        httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text=body))) as client,
        pytest.raises(FetchError, match=r"https://auth\.example/token returns no token"),
    ):
        registry.token(client, 'Bearer realm="https://auth.example/token",service="a"')
