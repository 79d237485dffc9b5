import subprocess
import sys

import pytest

import deconv_model


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_every_public_name_exists_and_says_what_it_is() -> None:
    names = [name for homes in deconv_model._HOMES.values() for name in homes]
    assert sorted(names) == sorted(deconv_model.__all__)
    assert not set(names) & deconv_model._HOMES.keys()  # or importing the module would hide the name
    for name in names:
        assert getattr(deconv_model, name).__doc__
        assert name in dir(deconv_model)


def test_a_configuration_needs_no_torch() -> None:
    code = "import sys; from deconv_model import preset, summarise, TrainingConfig, AutoencoderConfig; "
    assert _run(code + "summarise(preset('tiny')); print('torch' in sys.modules)").strip() == "False"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deconv_model.nothing  # noqa: B018
