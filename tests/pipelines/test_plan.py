import json

import pytest

from pipelines.config import parse_config
from pipelines.errors import ConfigError, DataError
from pipelines.steps import STEPS, StepSpec, load_step, plan
from pipelines.store import step_address
from tests.pipelines.corpora import corpus_config, make_texts, specs_of, write_shard

# What a change of a setting changes: the addresses of its own step and of all that read it, and no other.
AFTER = {
    "corpus": ("corpus", "tokenizer", "tokens", "train", "evaluate", "register"),
    "tokenizer": ("tokenizer", "tokens", "train", "evaluate", "register"),
    "tokens": ("tokens", "train", "evaluate", "register"),
    "train": ("train", "evaluate", "register"),
    "evaluate": ("evaluate", "register"),
    "register": ("register",),
}


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    write_shard(folder / "a.parquet", make_texts(5))
    return folder


def changed(config, overrides):
    one, two = specs_of(config), specs_of(corpus_config(config.corpus.path, *overrides))
    return tuple(step for step in STEPS if one[step].address != two[step].address)


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("corpus.valid_fraction=0.1", "corpus"),
        ("corpus.test_fraction=0.1", "corpus"),
        ("tokenizer.vocab_size=301", "tokenizer"),
        ("tokenizer.sample_bytes=10000", "tokenizer"),
        ("tokens.checked_documents=1", "tokens"),
        ("model.context_length=128", "train"),
        ("model.dropout=0.1", "train"),
        ("model.levels.1.encoder.heads=2", "train"),
        ("train.steps=7", "train"),
        ("train.seed=7", "train"),
        ("train.batch_size=7", "train"),
        ("train.micro_batch_size=7", "train"),
        ("train.eval_every=7", "train"),
        ("train.precision=float32", "train"),
        ("evaluate.seed=7", "evaluate"),
        ("evaluate.max_documents=7", "evaluate"),
        ("evaluate.samples=1", "evaluate"),
        ("register.name=other", "register"),
        ("register.confidence=0.9", "register"),
    ],
)
def test_a_setting_changes_its_step_and_those_that_follow(shards, override, section):
    assert changed(corpus_config(shards), [override]) == AFTER[section]


@pytest.mark.parametrize(
    "override", ["train.workers=2", "train.checkpoint_every=7", "train.activation_checkpointing=true"]
)
def test_settings_that_change_no_result_change_no_address(shards, override):
    assert changed(corpus_config(shards), [override]) == ()


def test_every_setting_of_every_section_is_in_an_address_or_known_to_be_ignored():
    ignored = {section: set(kind.ignored) for kind in STEPS.values() for section in kind.sections}
    assert ignored == {
        "corpus": {"path"},
        "tokenizer": {"path"},
        "tokens": set(),
        "model": {"workers", "checkpoint_every", "activation_checkpointing"},
        "train": {"workers", "checkpoint_every", "activation_checkpointing"},
        "evaluate": set(),
        "register": set(),
    }


def test_a_plan_of_the_same_is_the_same(shards):
    config = corpus_config(shards)
    again = parse_config(json.loads(json.dumps(config.to_dict())))
    assert plan(again) == plan(config)


def test_a_plan_lists_inputs_before_those_who_read_them(shards):
    seen = {}
    for spec in plan(corpus_config(shards)):
        assert spec.inputs == {name: seen[name] for name in STEPS[spec.step].inputs}
        seen[spec.step] = spec.address
    assert list(seen) == ["corpus", "tokenizer", "tokens", "train", "evaluate", "register"]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_says_of_itself_what_the_plan_knows(step):
    assert callable(load_step(step).run)
    assert hasattr(load_step(step), "is_current") == (step == "register")


def test_another_source_is_another_corpus(shards, tmp_path):
    before = specs_of(corpus_config(shards))["corpus"].address
    assert specs_of(corpus_config(f"{shards}/../shards"))["corpus"].address == before, "the same place"
    write_shard(shards / "b.parquet", make_texts(5))
    with_another_shard = specs_of(corpus_config(shards))["corpus"].address
    write_shard(shards / "b.parquet", make_texts(6))
    with_another_text = specs_of(corpus_config(shards))["corpus"].address
    (shards / "b.parquet").rename(shards / "c.parquet")
    with_another_name = specs_of(corpus_config(shards))["corpus"].address
    assert len({before, with_another_shard, with_another_text, with_another_name}) == 4
    (shards / "c.parquet").unlink()
    assert specs_of(corpus_config(shards))["corpus"].address == before


def test_a_given_tokenizer_counts_by_its_bytes(shards, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    moved = tmp_path / "elsewhere.json"
    moved.write_text("{}")
    address = specs_of(corpus_config(shards, f"tokenizer.path={file}"))["tokenizer"].address
    assert specs_of(corpus_config(shards, f"tokenizer.path={moved}"))["tokenizer"].address == address
    file.write_text("{ }")
    assert specs_of(corpus_config(shards, f"tokenizer.path={file}"))["tokenizer"].address != address


def test_a_given_tokenizer_that_is_not_there_is_refused_by_the_plan(shards, tmp_path):
    for path in (tmp_path / "nope.json", tmp_path, '"\\0"', "nope://x"):
        with pytest.raises(ConfigError, match=r"tokenizer\.path|cannot use the address"):
            plan(corpus_config(shards, f"tokenizer.path={path}"))


def test_a_corpus_that_is_not_there_is_refused_by_the_plan(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        plan(corpus_config(tmp_path / "nope"))
    with pytest.raises(DataError, match=r"no \*\.parquet files"):
        plan(corpus_config(tmp_path))


def spec_data(**changes):
    config = {"max_documents": 3, "seed": 0}
    data = {
        "step": "evaluate",
        "version": 1,
        "config": config,
        "inputs": {"tokens": "tokens-1"},
        "address": step_address("evaluate", 1, config, {"tokens": "tokens-1"}),
    }
    return {**data, **changes}


def test_a_specification_survives_json(shards):
    for spec in plan(corpus_config(shards)):
        assert StepSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_addresses_of_steps_do_not_change_with_the_release():
    assert StepSpec.from_dict(spec_data()).address == "evaluate-b286eeb5e9ae"
    model = {"context_length": 64, "levels": [{"width": 16}]}
    config = {"model": model, "train": {"steps": 3, "workers": 2, "checkpoint_every": 9}}
    with pytest.raises(ConfigError, match="is not the address") as caught:
        StepSpec.from_dict(spec_data(step="train", version=2, config=config))
    assert "evaluate-" in str(caught.value)
    identity = {"model": model, "train": {"steps": 3}}
    address = step_address("train", 2, identity, {"tokens": "tokens-1"})
    assert address == "train-961ab05853bf"
    assert StepSpec.from_dict(spec_data(step="train", version=2, config=config, address=address)).config == config


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"step": "evaluat"}, "unknown step 'evaluat'"),
        ({"step": []}, "unknown step"),
        ({"step": None}, "unknown step"),
        ({"version": 7}, "at version 1 here, the specification at 7"),
        ({"version": "1"}, "at version 1 here"),
        ({"config": {"max_documents": 4, "seed": 0}}, "is not the address"),
        ({"config": "all"}, "is not the address"),
        ({"inputs": {"tokens": "tokens-2"}}, "is not the address"),
        ({"inputs": None}, "is not the address"),
        ({"address": "../../etc"}, "is not the address"),
        ({"extra": 1}, "not a step specification"),
    ],
)
def test_a_specification_that_was_tampered_with_is_refused(changes, part):
    with pytest.raises(ConfigError) as caught:
        StepSpec.from_dict(spec_data(**changes))
    assert part in str(caught.value)


def test_a_specification_with_a_missing_key_is_refused():
    data = spec_data()
    del data["inputs"]
    with pytest.raises(ConfigError, match="not a step specification"):
        StepSpec.from_dict(data)
