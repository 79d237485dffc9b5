import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deconv_model.generation import generate
from deconv_model.saving import load_model
from deconv_model.scoring import score_documents
from pipelines import scoring, verification
from pipelines.steps import register
from pipelines.store import StepOutput
from tests.pipelines.finished_steps import finish_evaluate, finish_inputs, register_output, use_fresh_mlflow

TEXTS = ["the model reads a text", "naïve 試験", "an <|endoftext|> in the text", "the loss " * 40]

_WITHOUT_PICKLE = """
import json, pickle, sys
import mlflow.pyfunc, cloudpickle, torch  # what they do while they are imported is their own

def refuse(*args, **kwargs):
    raise AssertionError("something was unpickled")

for module in (pickle, cloudpickle):
    for name in ("load", "loads", "Unpickler"):
        setattr(module, name, refuse)
torch.load = refuse
model = mlflow.pyfunc.load_model(sys.argv[1])
import deconv_model
answer = model.predict([{"text": text} for text in json.loads(sys.argv[2])], params={"max_new_tokens": 5, "seed": 3})
print(json.dumps({"code": deconv_model.__file__, **answer.to_dict("list")}))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StepOutput]:
    root = tmp_path_factory.mktemp("model")
    return finish_evaluate(root, finish_inputs(root, steps=20))


@pytest.fixture(scope="module")
def registered(inputs, tmp_path_factory):
    """Register once; the environment stays set for the whole module."""
    root = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patched:
        use_fresh_mlflow(root, patched)
        patched.setattr(verification, "verify_in_fresh_process", lambda *_: None)
        result = register.run({"name": "tiny", "confidence": 0.95}, inputs, register_output(root, inputs))
        yield result["model_uri"], root


@pytest.fixture(scope="module")
def served(registered) -> Any:
    import mlflow

    path = list(sys.path)
    model = mlflow.pyfunc.load_model(registered[0])
    sys.path[:] = path
    return model


def _expected_bits(inputs, texts):
    model, tokenizer = load_model(inputs["train"].local("model"))
    documents = scoring.encode_documents(tokenizer, texts, 0)
    sizes = [len(text.encode()) for text in texts]
    return score_documents(model, documents, start_id=0) / math.log(2) / sizes


def test_the_artifact_holds_code_and_weights_but_no_pickle(registered):
    _, root = registered
    (folder,) = (root / "artifacts" / "models").iterdir()
    files = {path.relative_to(folder / "artifacts").as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in files if Path(name).suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin")]
    assert {"artifacts/model/model.safetensors", "serving.py", "code/deconv_model/generation.py", "MLmodel"} <= files
    requirements = (folder / "artifacts" / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {
        *("mlflow", "torch", "numpy", "safetensors", "tokenizers", "pandas")
    }
    assert all("==" in line and "+" not in line for line in requirements)


@pytest.mark.slow
def test_it_answers_where_nothing_may_be_unpickled(inputs, registered, tmp_path):
    command = [sys.executable, "-c", _WITHOUT_PICKLE, registered[0], json.dumps(TEXTS)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["code"].startswith(str(registered[1] / "artifacts"))
    assert answer["bits_per_byte"] == pytest.approx(_expected_bits(inputs, TEXTS), rel=1e-6)
    assert all(answer["text"])


def test_it_scores_and_continues_each_text(inputs, served):
    answer = served.predict(pd.DataFrame({"text": TEXTS}), params={"max_new_tokens": 6, "temperature": 0.5, "seed": 1})
    assert list(answer.columns) == ["text", "bits_per_byte"]
    assert answer["bits_per_byte"].tolist() == pytest.approx(_expected_bits(inputs, TEXTS), rel=1e-6)
    model, tokenizer = load_model(inputs["train"].local("model"))
    ids = [0, *tokenizer.encode(TEXTS[0]).ids]
    new = generate(model, ids, max_new_tokens=6, temperature=0.5, top_k=50, seed=1, stop_id=0)
    assert answer["text"][0] == tokenizer.decode([token for token in new if token != 0])


def test_the_seed_decides_the_text(served):
    def text(**params):
        return served.predict(pd.DataFrame({"text": ["the"]}), params={"max_new_tokens": 12, **params})["text"][0]

    assert text(seed=1) == text(seed=1)
    assert len({text(seed=seed) for seed in range(5)}) > 1
    assert len({text(seed=seed, temperature=0.0) for seed in range(5)}) == 1


def test_no_new_tokens_only_scores(served):
    answer = served.predict(pd.DataFrame({"text": ["the model", ""]}), params={"max_new_tokens": 0})
    assert answer["text"].tolist() == ["", ""]
    assert answer["bits_per_byte"][0] > 0
    assert math.isnan(answer["bits_per_byte"][1])  # there is no byte to divide by


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "top_k", "seed"])
def test_a_parameter_below_its_bound_is_a_bad_request(served, name):
    from mlflow import MlflowException

    with pytest.raises(MlflowException, match=f"{name} must be at least 0") as caught:
        served.predict(pd.DataFrame({"text": ["the"]}), params={name: -1})
    assert caught.value.get_http_status_code() == 400


def test_an_input_without_text_is_a_bad_request(served):
    from mlflow import MlflowException

    with pytest.raises(MlflowException, match="missing inputs"):
        served.predict(pd.DataFrame({"texts": ["the"]}))
