import hashlib
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from deconv_model.autoencoder import Autoencoder
from deconv_model.autoencoder_config import AutoencoderConfig
from deconv_model.language_model import LanguageModel
from deconv_model.saving import load_autoencoder, load_model, save_model, weights_sha256
from tests.deconv_model.small_models import ALL_CONFIGS, CONFIGS, CONTEXT, VOCABULARY, random_ids, randomised_model

torch.set_num_threads(1)


def _tokenizer_file(folder: Path, size: int = VOCABULARY) -> Path:
    path = folder / f"words-{size}.json"
    Tokenizer(models.WordLevel({f"word{i}": i for i in range(size)}, unk_token="word0")).save(str(path))
    return path


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, LanguageModel]:
    model = randomised_model(CONFIGS["three levels, attention everywhere"], torch.float32)
    save_model(tmp_path / "runs" / "model", model, _tokenizer_file(tmp_path))
    return tmp_path / "runs" / "model", model


@pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_model_computes_the_same_bits(tmp_path: Path, config, dtype: torch.dtype) -> None:
    model = randomised_model(config, dtype).train()
    save_model(tmp_path, model, _tokenizer_file(tmp_path))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded, tokenizer = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == config
    assert not loaded.training
    assert tokenizer.encode("word7").ids == [7]
    ids = random_ids(2, CONTEXT)
    assert torch.equal(loaded(ids), model.eval()(ids))
    loaded.token_losses(ids, ids).sum().backward()  # it can be trained on
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_folder_holds_three_files_and_saving_again_replaces_them(tmp_path: Path, saved) -> None:
    folder, model = saved
    digest = weights_sha256(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "tokenizer.json").read_bytes() == _tokenizer_file(tmp_path).read_bytes()
    with torch.no_grad():
        model.embedding[0, 0] += 1.0
    save_model(folder, model, _tokenizer_file(tmp_path))
    assert weights_sha256(folder) != digest
    assert len(list(folder.iterdir())) == 3
    assert torch.equal(load_model(folder)[0].embedding, model.embedding)


def test_the_same_weights_are_the_same_bytes(tmp_path: Path, saved) -> None:
    folder, model = saved
    copy = LanguageModel(model.config)
    copy.load_state_dict(dict(reversed(model.state_dict().items())))
    save_model(tmp_path / "copy", copy, _tokenizer_file(tmp_path))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(folder) == weights_sha256(tmp_path / "copy") == digest


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "no text"])
def test_a_damaged_file_is_named(saved, name: str, damage: str) -> None:
    path = saved[0] / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut off": whole[:-20], "no text": b"\xff\xfe" * 40}[damage])
    with pytest.raises(ValueError, match=name) as error:
        load_model(saved[0])
    assert str(error.value).startswith(f"{path}: ")


def test_files_that_do_not_fit_each_other_are_refused(tmp_path: Path, saved) -> None:
    folder, _ = saved
    other = randomised_model(CONFIGS["two levels, coarse attention"])
    save_model(tmp_path / "other", other, _tokenizer_file(tmp_path, size=VOCABULARY + 1))
    with pytest.raises(ValueError, match=r"tokenizer\.json: has 31 ids, the model 30"):
        load_model(tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors: does not fit config\.json"):
        load_model(folder)


def test_a_configuration_from_another_time_is_refused(saved) -> None:
    path = saved[0] / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format": 3}))
    with pytest.raises(ValueError, match=r"config\.json: .*format 3 is not 2: load it with the version"):
        load_model(saved[0])
    path.write_text(json.dumps({**data, "kind": "parrot"}))
    with pytest.raises(ValueError, match=r"config\.json: .*kind 'parrot' is none of hourglass, lstm, autoencoder"):
        load_model(saved[0])
    path.write_text(json.dumps({**data, "model": {**data["model"], "vocab_size": 1}}))
    with pytest.raises(ValueError, match=r"config\.json: .*vocab_size must be at least 2, got 1"):
        load_model(saved[0])


def test_weights_that_are_not_there_have_no_digest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        weights_sha256(tmp_path)


def test_an_autoencoder_comes_back_and_is_not_taken_for_a_language_model(tmp_path: Path, saved) -> None:
    config = AutoencoderConfig(
        vocab_size=VOCABULARY, context_length=8, latent="spatial", latent_size=3, widths=(8, 8), strides=(2,)
    )
    torch.manual_seed(0)
    model = Autoencoder(config).eval()
    save_model(tmp_path / "autoencoder", model, _tokenizer_file(tmp_path))
    loaded, _ = load_autoencoder(tmp_path / "autoencoder")
    assert loaded.config == config
    ids = random_ids(2, 8)
    assert torch.equal(loaded.token_losses(ids, ids), model.token_losses(ids, ids))
    with pytest.raises(ValueError, match=r"config\.json: is that of an autoencoder: use load_autoencoder"):
        load_model(tmp_path / "autoencoder")
    with pytest.raises(ValueError, match=r"config\.json: is that of a language model: use load_model"):
        load_autoencoder(saved[0])
