"""A few of the matrix's adapters on each architecture; `make matrix` goes through all of them."""

import pytest

from phatgoose import ExpertPool, route
from phatgoose.errors import UnsupportedAdapterError
from tests.experts.matrix import FAMILIES, LARGEST, QUICK, VARIANTS, Family, cell, make_adapter
from tests.models import make_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


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


def test_all_linear_of_a_mixture_names_its_router(tmp_path):
    family = Family("qwen3-moe")
    folder = make_adapter(tmp_path / "e", family, {"target_modules": "all-linear"})
    with pytest.raises(UnsupportedAdapterError, match="mixture's own router .* leave it out of"):
        route(make_model(family.name), ExpertPool.load([folder]), "uniform")
