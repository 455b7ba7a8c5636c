"""Live comparison with transformers: what is recorded for each family is still what it computes, and what it writes."""

import families
import numpy as np
import pytest
from families import CASES

from converters.architectures import ARCHITECTURES

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_is_recorded_for_a_family(case):
    pytest.importorskip("torch")
    import family_goldens  # noqa: PLC0415  (imports transformers)

    recorded = families.golden(case)
    assert family_goldens.tensor_shapes(case) == recorded["shapes"]
    computed = family_goldens.compute(case, recorded["shapes"], recorded["seed"])
    assert computed["greedy"] == recorded["greedy"]
    assert computed["least_margin"] > 1e-3
    for found, expected in zip(computed["logits"], recorded["logits"], strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_attribute_that_transformers_writes_for_a_family_is_known(name):
    transformers = pytest.importorskip("transformers")
    conversion = ARCHITECTURES[name]
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[conversion.model_type]
    # StarCoder 2's own defaults are tokens that its vocabulary does not have
    written = kind(architectures=[name], bos_token_id=0, eos_token_id=0).to_dict()
    assert conversion.translate(written, dtype=None, default_dtype="float32").architecture == name
