"""The learning rate where none is given."""

from __future__ import annotations

import pytest
import yaml
from support.stages import STAGES, train_stage
from support.tiny import tiny_folder

from rlhf_trainer.models.loading import load_tokenizer

FULL = {"sft": 1e-4, "reward": 5e-5, "dpo": 5e-6, "ppo": 1e-5}


@pytest.mark.parametrize(("options", "times"), [({}, 1), ({"lora_r": 2}, 10), ({"lora_r": 2, "lr": 1e-3}, None)])
@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_gets_ten_times_the_rate_of_all_weights(stage, options, times, tmp_path, capsys):
    folder = tiny_folder(tmp_path / "m")
    options = {"lr": None, **options}
    train_stage(stage, None, load_tokenizer(folder), model_name=folder, output_dir=str(tmp_path / "out"), **options)
    used = yaml.safe_load((tmp_path / "out" / "config_resolved.yaml").read_text())["lr"]
    said = f"--lr {FULL[stage] * (times or 0):g}, the default for {'LoRA' if 'lora_r' in options else 'training every'}"
    assert used == pytest.approx(options["lr"] or times * FULL[stage])
    assert (said in capsys.readouterr().err) == (times is not None)
