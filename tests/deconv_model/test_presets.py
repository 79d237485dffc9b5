from typing import get_args

import pytest

from deconv_model.model_summary import summarise
from deconv_model.presets import Size, Units, preset


@pytest.mark.parametrize("units", get_args(Units))
@pytest.mark.parametrize(
    ("size", "least", "most"), [("tiny", 3e6, 3.5e6), ("small", 9e6, 11.5e6), ("base", 1e8, 1.3e8)]
)
def test_a_preset_has_the_size_that_its_name_promises(size: Size, units: Units, least: float, most: float) -> None:
    summary = summarise(preset(size, units))
    assert least < summary.parameters - summary.embedding_parameters < most


def test_the_vocabulary_can_be_chosen() -> None:
    assert preset("tiny", vocab_size=1000).vocab_size == 1000
    assert preset("tiny", "bytes").vocab_size == 257


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be one of tiny, small, base, got 'huge'"):
        preset("huge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="units must be one of bytes, subwords, got 'words'"):
        preset("tiny", "words")  # type: ignore[arg-type]
