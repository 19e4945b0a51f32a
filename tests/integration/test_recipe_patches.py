"""The patches of the recipes for sdists: each applies to exactly the pinned source, and says what it is to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder import fetch
from builder.fetch import source
from builder.planning import recipe
from builder.planning.settings import Settings
from gracefarm.errors import SourceError
from tests.conftest import REPOSITORY


def tree(name: str, home: Path, into: Path) -> Path:
    """The patched source of a recipe; the sdist comes from the configured index, or from the machine's store."""
    loaded = recipe.load(REPOSITORY / "recipes", name)
    fetched = fetch.fetch(loaded.data, Settings(home=home, project=REPOSITORY))
    return source.unpack(loaded, fetched, into, 1_700_000_000)


def test_flash_attn_of_two_head_dimensions_refuses_the_others_by_name(shared_home: Path, tmp_path: Path) -> None:
    made = tree("flash_attn_cu130", shared_home, tmp_path / "tree")
    header = (made / "csrc/flash_attn/src/static_switch.h").read_text()
    # The last definition is the one that counts; a missing kernel is a sentence, not another kernel's numbers.
    own = header.rpartition("#define HEADDIM_SWITCH")[2]
    assert '"this build of FlashAttention has kernels for "' in own
    assert '"head dimensions 33 to 64 and 97 to 128 alone, not for ", (HEADDIM)' in own
    assert header.count("#undef HEADDIM_SWITCH") == 1
    setup = (made / "setup.py").read_text()
    assert setup.index("_hdim(64|128)_") < setup.index("\nsetup(\n"), "the list is cut after it was used"


def test_causal_conv1d_reads_the_whole_tail_of_the_chunk_before(shared_home: Path, tmp_path: Path) -> None:
    made = tree("causal_conv1d", shared_home, tmp_path / "tree")
    kernel = (made / "csrc/causal_conv1d_bwd.cu").read_text()
    assert "x_vals_load[i] = x[-kNElts + i];" in kernel
    assert "if (chunk * kChunkSize + i < params.seqlen) { x_vals_load[i]" not in kernel


def test_a_patch_of_another_source_is_refused(shared_home: Path, tmp_path: Path) -> None:
    """Else the tests above would pass with a patch that is skipped where it does not fit."""
    loaded = recipe.load(REPOSITORY / "recipes", "causal_conv1d")
    (patch,) = loaded.patches
    changed = tmp_path / patch.name
    # A line of the source that is in no release.
    first = next(line for line in patch.read_text().splitlines() if line.startswith((" ", "-")) and line.strip(" -ab/.+"))
    changed.write_text(patch.read_text().replace(f"\n{first}\n", f"\n{first} // of another release\n", 1))
    fetched = fetch.fetch(loaded.data, Settings(home=shared_home, project=REPOSITORY))
    other = recipe.LoadedRecipe(
        folder=loaded.folder, data=loaded.data, patches=(changed,), smoke_script=None, smoke_gpu_script=None
    )
    with pytest.raises(SourceError, match=patch.name):
        source.unpack(other, fetched, tmp_path / "tree", 1_700_000_000)
