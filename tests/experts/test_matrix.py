"""A few of the matrix's adapters on each architecture; `make matrix` goes through all of them."""

import pytest
from tests.experts.matrix import FAMILIES, LARGEST, QUICK, VARIANTS, Family, cell

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_there_are_sixty_adapters_and_six_architectures():
    assert len(VARIANTS) >= 60 and len(set(FAMILIES)) == 6 and set(QUICK) <= set(VARIANTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", QUICK)
def test_an_adapter_is_peft_s_own_forward(variant, family, tmp_path):
    found = cell(Family(family), variant, tmp_path)
    if found.difference is None:
        assert found.reason == "has no batched experts" and variant.startswith("experts")
    else:
        assert found.difference <= LARGEST
