"""Which licences allow that a wheel is passed on, and what happens to one whose licence does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builder.flow.publishing import refuse_licence
from builder.planning import recipe
from builder.planning.licences import redistributable
from gracefarm.errors import PublishError
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("AGPL-3.0-only", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("CC-BY-4.0", True),
        ("LicenseRef-Proprietary", False),
        ("CC-BY-NC-4.0", False),
        ("CC-BY-ND-4.0", False),
        ("CC-BY-NC-ND-4.0", False),
        ("MIT AND LicenseRef-Proprietary", False),
        ("MIT OR LicenseRef-Proprietary", True),
        ("LicenseRef-Proprietary OR MIT AND BSD-3-Clause", True),
        ("MIT AND (LicenseRef-Proprietary OR BSD-3-Clause)", True),
        ("(MIT OR LicenseRef-Proprietary) AND LicenseRef-Other", False),
    ],
)
def test_what_spdx_does_not_list_and_what_forbids_it_is_not_passed_on(expression: str, allowed: bool) -> None:
    assert redistributable(expression) is allowed


def test_a_licence_that_does_not_allow_it_is_not_published_unless_the_recipe_says_why() -> None:
    loaded = recipe.load(REPOSITORY / "recipes", "causal_conv1d")
    refuse_licence(loaded)
    closed = replace(loaded, data=loaded.data.model_copy(update={"license": "LicenseRef-Proprietary"}))
    with pytest.raises(PublishError, match="does not allow redistribution of its wheel") as refused:
        refuse_licence(closed)
    assert "may_publish" in refused.value.remedy
    wheel = closed.data.wheel.model_copy(update={"may_publish": "its maker agreed by letter"})
    refuse_licence(replace(closed, data=closed.data.model_copy(update={"wheel": wheel})))
