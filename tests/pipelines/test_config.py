import json
from collections.abc import Callable

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.config import PRESETS, PipelineConfig, load_config, parse_config, preset_names
from pipelines.errors import ConfigError

DEMO = yaml.safe_load((PRESETS / "demo.yaml").read_text())


def message_of(*overrides: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def values_of(data: object) -> set[str]:
    """Dotted keys of all plain values, as `--set` names them."""
    if isinstance(data, dict | list):
        pairs = data.items() if isinstance(data, dict) else enumerate(data)
        return {f"{key}.{rest}".rstrip(".") for key, value in pairs for rest in values_of(value) or {""}}
    return set()


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_and_survives_its_own_json(preset):
    config = load_config(preset=preset)
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config


def test_the_presets_are_those_of_the_help_text():
    assert preset_names() == ["base", "demo", "wikitext2"]


def test_every_value_can_be_set_to_what_it_is():
    config = load_config()
    data = config.to_dict()
    overrides = []
    for key in sorted(values_of(data)):
        value = data
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        overrides.append(f"{key}={json.dumps(value)}")
    assert len(overrides) > 40
    assert load_config(overrides=overrides) == config


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("train.muon_lr=1e-3", "train", "muon_lr", 1e-3),
        ("train.muon_lr=1.5E-3", "train", "muon_lr", 1.5e-3),
        ("train.muon_lr=.01", "train", "muon_lr", 0.01),
        ("evaluate.temperature=1", "evaluate", "temperature", 1.0),
        ("evaluate.max_documents=null", "evaluate", "max_documents", None),
        ("evaluate.max_documents=", "evaluate", "max_documents", None),
        ("corpus.path=s3://bucket/a=b", "corpus", "path", "s3://bucket/a=b"),
        ("corpus.path=data/1e3/x", "corpus", "path", "data/1e3/x"),
        ("corpus.path='2024'", "corpus", "path", "2024"),
        ("corpus.text_column=body text", "corpus", "text_column", "body text"),
        ("register.name='300'", "register_", "name", "300"),
    ],
)
def test_overrides_are_read_as_yaml(override, section, key, value):
    found = getattr(getattr(load_config(overrides=[override]), section), key)
    assert (found, type(found)) == (value, type(value))


def test_items_of_lists_are_named_by_their_number():
    config = load_config(overrides=["model.levels.1.encoder.heads=8", "model.levels.0.width=128"])
    assert [level.width for level in config.model.levels] == [128, 256]
    assert config.model.levels[1].encoder.heads == 8
    assert config.model.levels[1].encoder.layers == 2, "the rest stays"


def test_later_overrides_win_and_sections_can_be_set_whole():
    config = load_config(overrides=["train={steps: 5}", "train.steps=6", "train.steps=7", "train.seed=3"])
    assert (config.train.steps, config.train.seed, config.train.batch_size) == (7, 3, 32)


def test_a_file_lies_over_the_preset_and_overrides_over_both(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "train: {steps: 9, seed: 4}\nmodel:\n  levels:\n    - {width: 64, encoder: {layers: 1, hidden: 64}}\n"
    )
    config = load_config(preset="demo", file=file, overrides=["train.seed=5"])
    assert (config.train.steps, config.train.seed, config.train.batch_size) == (9, 5, DEMO["train"]["batch_size"])
    assert [level.width for level in config.model.levels] == [64], "lists are replaced as a whole"
    assert config.model.context_length == DEMO["model"]["context_length"]


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_config(file=tmp_path / "empty.yaml") == load_config()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"train: {steps: [", "is not YAML"),
        (b"train:\n\t- x", "is not YAML"),
        (b"a: !!python/object:os.system {}", "is not YAML"),
        (b"corpus: {path: 2020-13-45}", "is not YAML"),
        (b"[" * 5000, "is not YAML"),
        (b"- a\n- b\n", "must hold sections"),
        (b"just text", "must hold sections"),
        (b"\xff\xfe\x00", "cannot read the configuration"),
        (b"train: {stepz: 3}", "unknown key train.stepz; the nearest known one is train.steps"),
        (b"train:\n", "train "),
        (b"1: 2\n", "1"),
    ],
)
def test_files_that_cannot_work(tmp_path, content, part):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert part in message_of(file=tmp_path / "bad.yaml")


def test_files_that_are_not_there(tmp_path):
    assert "No such file" in message_of(file=tmp_path / "nope.yaml")
    assert "directory" in message_of(file=tmp_path)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trian.steps=3", "train"),
        ("regster.name=x", "register"),
        ("train.step=3", "train.steps"),
        ("train.worker=1", "train.workers"),
        ("corpus.text_colunm=x", "corpus.text_column"),
        ("model.contextlength=256", "model.context_length"),
        ("model.levels.0.witdh=64", "model.levels.0.width"),
        ("model.levels.1.encoder.hiden=64", "model.levels.1.encoder.hidden"),
        ("model.levels.0.decoder.layer=1", "model.levels.0.decoder.layers"),
        ("tokens.checked=1", "tokens.checked_documents"),
    ],
)
def test_an_unknown_key_names_the_nearest(override, nearest):
    key = override.partition("=")[0]
    wrong = key if key.startswith(nearest.rpartition(".")[0] + ".") else key.partition(".")[0]
    assert message_of(override).startswith(f"unknown key {wrong}; the nearest known one is {nearest}")


def test_an_unknown_key_that_is_near_to_none_names_all():
    assert "; known are path, text_column, max_bytes," in message_of("corpus.zzz=1")


def test_an_unknown_preset_names_the_nearest():
    assert message_of(preset="wikitext") == "unknown preset 'wikitext'; the nearest known one is wikitext2"
    assert "known are base, demo, wikitext2" in message_of(preset="zzz")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        (
            "tokenizer.vocab_size=256",
            "tokenizer.vocab_size must be at least 257 (every byte and the end of a document), got 256",
        ),
        ("tokenizer.vocab_size=2000000", "tokenizer.vocab_size must be less than or equal to 1000000, got 2000000"),
        ("corpus.valid_fraction=0", "corpus.valid_fraction must be greater than 0, got 0"),
        ("corpus.test_fraction=0.5", "corpus.test_fraction must be less than 0.5, got 0.5"),
        ("corpus.text_column=''", "corpus.text_column "),
        ("corpus.path=3", "corpus.path must be a valid string, got 3"),
        ("train.steps=0", "train.steps must be at least 1, got 0"),
        ("train.steps=many", "train.steps must be a valid integer"),
        ("train.steps=1.5", "train.steps must be a valid integer"),
        ("train.steps=.inf", "train.steps"),
        ("train.muon_lr=.nan", "train.muon_lr must be between 0 and 1, got nan"),
        ("train.weight_decay=-1", "train.weight_decay must be at least 0, got -1"),
        ("train.warmup=0.9", "train.warmup must be at most constant_until, got 0.9"),
        ("train.precision=float16", "train.precision must be 'auto', 'float32' or 'bfloat16', got 'float16'"),
        ("train.workers=-1", "train.workers must be at least 0, got -1"),
        ("model.context_length=255", "model.context_length must be a multiple of the product of strides (4), got 255"),
        ("model.levels=[]", "model.levels must not be empty"),
        ("model.levels.0.width=0", "model.levels.0.width must be at least 1, got 0"),
        ("model.levels.1.stride=1", "model.levels.1.stride must be at least 2, got 1"),
        ("model.levels.1.encoder.heads=3", "model.levels.1.width 256 must be a multiple of 2 x heads (6)"),
        ("model.levels.0.decoder=null", "model.levels.0.decoder is missing"),
        ("model.levels.1.deconv_kernel=3", "model.levels.1.deconv_kernel must be a multiple of the stride 4, got 3"),
        ("model.dropout=1", "model.dropout must be in [0, 1), got 1"),
        ("model.levels.0={width: 3}", "model.levels.0.encoder is missing"),
        ("evaluate.bootstrap_resamples=1", "evaluate.bootstrap_resamples must be greater than or equal to 10, got 1"),
        ("register.name=a/b", "register.name "),
        ("register.confidence=1", "register.confidence must be less than 1, got 1"),
        ("train=null", "train "),
        ("corpus=docs", "corpus "),
    ],
)
def test_values_that_cannot_work_say_where_and_why(override, part):
    assert part in message_of(override)


def test_all_faults_are_told_at_once():
    message = message_of("train.steps=0", "corpus.pth=x", "tokenizer.vocab_size=3")
    assert all(part in message for part in ("train.steps", "corpus.pth", "tokenizer.vocab_size"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps", "must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("", "must look like section.key=value"),
        ("train.steps={", "is not YAML"),
        ("corpus.path=2020-13-45", "is not YAML"),
        ("train.steps=0x_", "is not YAML"),
        ("train.steps.x=3", "'steps' is a value, not a section"),
        ("model.levels.2.width=3", "'2' is not one of the items 0 to 1"),
        ("model.levels.-1.width=3", "'-1' is not one of the items 0 to 1"),
        ("model.levels.².width=3", "'²' is not one of the items 0 to 1"),
        ("model.levels.x=3", "'x' is not one of the items 0 to 1"),
        ("a\nb=3", "unknown key a b"),
        (".=3", "unknown key"),
        ("train..steps=3", "unknown key"),
    ],
)
def test_overrides_that_cannot_be_applied(override, part):
    assert part in message_of(override)


def ask(call: Callable[[], PipelineConfig]) -> PipelineConfig | str:
    """Return the configuration, or the message that says why there is none."""
    try:
        return call()
    except ConfigError as error:
        return str(error)


KEYS = sorted(values_of(load_config().to_dict()) | {"corpus", "train", "model.levels", "model.levels.0.encoder", "x.y"})
JUNK = st.one_of(
    st.sampled_from(
        ["", "null", "[]", "{}", "{a: 1}", "-1", "0", "1e999", ".nan", "true", "!!binary x", "&a [*a]", "9" * 5000]
    ),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)).map(json.dumps),
)


@given(st.lists(st.builds("{}={}".format, st.sampled_from(KEYS) | st.text(max_size=8), JUNK), max_size=3))
@example(["train.seed=" + "9" * 5000])
@example(["model.levels.0=&a {width: 3, encoder: *a}"])
@settings(max_examples=150, deadline=None)
def test_whatever_is_set_the_answer_is_a_configuration_or_one_line(overrides):
    answer = ask(lambda: load_config(overrides=overrides))
    if isinstance(answer, PipelineConfig):
        json.dumps(answer.to_dict())
    else:
        assert len(answer.splitlines()) == 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(DEMO["model"]),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from([*DEMO, *DEMO["model"], "width", "encoder", "layers"]) | st.integers(), x)
        ),
        max_leaves=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_data_is_a_configuration_or_one_line(data):
    answer = ask(lambda: parse_config(data))
    assert isinstance(answer, PipelineConfig) or len(answer.splitlines()) == 1
