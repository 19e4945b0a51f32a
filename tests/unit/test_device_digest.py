"""Names of device code without what nvcc makes of a source's path and of the host; the digest itself is in test_certify."""

from __future__ import annotations

import pytest

from builder.audit.device_digest import stable_name


@pytest.mark.parametrize(
    ("here", "there"),
    [
        # causal-conv1d 1.7.0, nvcc 13.0.88, for aarch64 and for x86_64
        (
            "_ZN54_INTERNAL_feceb7dc_20_causal_conv1d_bwd_cu_feceb7dc_654cuda3std3__45__cpo5beginE",
            "_ZN54_INTERNAL_8e4a7fd3_20_causal_conv1d_bwd_cu_d492f74c_554cuda3std3__45__cpo5beginE",
        ),
        # another count of digits at the end of the id
        (
            "_ZN54_INTERNAL_feceb7dc_20_causal_conv1d_bwd_cu_feceb7dc_654cuda3std3__45__cpo5beginE",
            "_ZN55_INTERNAL_8e4a7fd3_20_causal_conv1d_bwd_cu_d492f74c_1554cuda3std3__45__cpo5beginE",
        ),
        ("_ZN33_GLOBAL__N__db087312_4_k_cu__Z1fv3twoEPib", "_ZN33_GLOBAL__N__00c0ffee_4_k_cu__Z1fv3twoEPib"),
        # a name before it that ends with a digit
        ("_ZN4foo233_GLOBAL__N__db087312_4_k_cu__Z1fv3twoEPib", "_ZN4foo233_GLOBAL__N__00c0ffee_4_k_cu__Z1fv3twoEPib"),
        ("__nv_static_26__db087312_4_k_cu_feceb7dc_12_table", "__nv_static_27__00c0ffee_4_k_cu_d492f74c_7_table"),
    ],
)
def test_ids_of_a_translation_unit_do_not_count(here: str, there: str) -> None:
    assert here != there
    assert stable_name(here) == stable_name(there)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("_ZN33_GLOBAL__N__db087312_4_k_cu__Z1fv3twoEPib", "_ZN33_GLOBAL__N__db087312_4_k_cu__Z1fv3twoEPic"),
        ("_ZN33_GLOBAL__N__db087312_4_k_cu__Z1fv3twoEPib", "_ZN33_GLOBAL__N__db087312_4_j_cu__Z1fv3twoEPib"),
        ("_ZN4foo233_GLOBAL__N__db087312_4_k_cu__Z1fv3twoEPib", "_ZN4foo333_GLOBAL__N__db087312_4_k_cu__Z1fv3twoEPib"),
        ("__nv_static_26__db087312_4_k_cu_feceb7dc_12_table", "__nv_static_26__db087312_4_k_cu_feceb7dc_12_tables"),
    ],
)
def test_what_is_named_counts(here: str, there: str) -> None:
    assert stable_name(here) != stable_name(there)


@pytest.mark.parametrize("name", ["", "_Z1rPf", "9_INTERNAL_db087312_4_", "1_GLOBAL__N__db087312_999_k_cu", ".text._Z1rPf"])
def test_other_names_stay(name: str) -> None:
    assert stable_name(name) == name
