import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from deconv_model.training_config import TrainingConfig


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("muon_lr", 1.0, "muon_lr must be between 0 and 1, got 1.0"),
        ("weight_decay", -0.1, "weight_decay must be at least 0, got -0.1"),
        ("gradient_clip", float("nan"), "gradient_clip must be at least 0, got nan"),
        ("max_skipped", -1, "max_skipped must be at least 0, got -1"),
        ("label_smoothing", 1.0, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ("average_decay", 1.0, r"average_decay must be in \[0, 1\), got 1.0"),
        ("final_lr", 1.1, r"final_lr must be in \[0, 1\], got 1.1"),
        ("warmup", 0.9, "warmup must be at most constant_until, got 0.9"),
        ("schedule", "wsd", "schedule must be one of trapezoid, cosine, got 'wsd'"),
        ("parallel", "tensor", "parallel must be one of replicated, ddp, fsdp, got 'tensor'"),
        ("precision", "float16", "precision must be one of auto, float32, bfloat16, got 'float16'"),
        ("seed", -1, r"seed must be in \[0, 2\*\*62\), got -1"),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_line(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainingConfig(**{"steps": 10, name: value})


def test_a_configuration_survives_json():
    config = TrainingConfig(steps=7, schedule="cosine", parallel="fsdp", average_decay=0.9, compile=True)
    assert TrainingConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_a_configuration_is_read_without_torch():
    code = "import sys, deconv_model.training_config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
