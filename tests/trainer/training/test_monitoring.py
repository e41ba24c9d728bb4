"""What leaves a run while it trains: trackers by way of accelerate, alerts, completions."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import math
import os
import tracemalloc
from contextlib import nullcontext
from dataclasses import asdict
from typing import ClassVar

import pytest
from accelerate import tracking
from support.tiny import tiny_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_trainer import ppo as ppo_module
from rlhf_trainer import sft
from rlhf_trainer.base.distributed import ProcessGroupInfo
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.writing import write_whole
from rlhf_trainer.cli import main
from rlhf_trainer.data.files import read_jsonl, write_jsonl
from rlhf_trainer.training import supervised, trackers
from rlhf_trainer.training.alerts import Alerts
from rlhf_trainer.training.checkpoint import StopRequest
from rlhf_trainer.training.history import History
from rlhf_trainer.training.runlog import RunLog, read_metrics
from rlhf_trainer.verification import reward_model as verify_reward

REWARD = "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
ROWS = [{"prompt": "a|b", "completion": "line\nline", "score": 0.5}]


class Stub(tracking.GeneralTracker):
    """Keeps what it is given; registered with accelerate as a user's own tracker would be."""

    name = "stub"
    requires_logging_directory = True
    runs: ClassVar[list[Stub]] = []

    def __init__(self, project, folder):
        super().__init__()
        self.project, self.folder, self.config, self.logged, self.finished = project, folder, None, [], False

    @property
    def tracker(self):
        return self.logged

    def start(self):
        Stub.runs.append(self)

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", dict(tracking.LOGGER_TYPE_TO_CLASS))
    tracking.register_tracker_class(Stub)
    Stub.runs.clear()
    return Stub


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("monitoring")
    tiny_folder(root / "base")
    (root / "prompts.txt").write_text("one day\ntwo good\nred night\nblue bad\n")
    (root / "reward.py").write_text(REWARD)
    write_jsonl(root / "examples.jsonl", [{"prompt": f"{w} day", "completion": " good"} for w in ("one", "two")] * 8)
    return root


def ppo(places, output, *options):
    given = {"model": f"{places}/base", "prompts": f"{places}/prompts.txt", "reward": f"{places}/reward.py:score"}
    given |= {"output_dir": str(output), "updates": 3, "batch_size": 4, "max_new_tokens": 4, "epochs": 1, "lr": 1e-3}
    return main(["ppo", *(f"--{key}={value}" for key, value in given.items()), *options])


def fit(places, output, **options):
    given = {"model": f"{places}/base", "data": f"{places}/examples.jsonl", "output_dir": str(output)}
    return sft.run(sft.Config(**{**given, "heldout": 0, "batch_size": 4, "lr": 1e-2, "device": "cpu", **options}))


def records(path):
    return [record for _, record in read_jsonl(path)]


# Trackers


def test_ppo_reports_metrics_config_completions_and_alerts(places, tmp_path, stub, capsys):
    condition = "val/response_length>0"
    assert ppo(places, tmp_path, "--report_to", "stub", "tensorboard", "--alert", condition) == 0
    (run,) = stub.runs
    assert (run.project, run.folder, run.finished) == ("rlhf", str(tmp_path), True)
    assert run.config["updates"] == 3
    assert run.config["alert"] == f"[{condition!r}]"
    metrics = read_metrics(tmp_path)
    scalars = [(step, values) for step, values in run.logged if "objective/kl" in values]
    assert [{"step": step, **values} for step, values in scalars] == metrics
    tables = [values["completions"] for _, values in run.logged if "completions" in values]
    assert len(tables) == 3
    assert tables[0].startswith("prompt|completion|score|kl\n---|---|---|---\n")
    alert = next(values["alert"] for _, values in run.logged if "alert" in values)  # the watch may have its own
    assert "val/response_length" in alert

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("objective/kl")] == pytest.approx(
        [record["objective/kl"] for record in metrics]
    )
    assert [event.step for event in events.Tensors("completions/text_summary")] == [1, 2, 3]
    assert events.Tensors("alert/text_summary")[0].step == 1
    assert b"kl_coef|0.05" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert not list((tmp_path / "tensorboard").rglob("hparams.yml"))

    (kept,) = [record for record in records(tmp_path / "alerts.jsonl") if record["metric"] == "val/response_length"]
    completions = [record["completion"] for record in records(tmp_path / "completions.jsonl") if record["step"] == 1]
    assert (kept["step"], kept["metric"]) == (1, "val/response_length")
    assert kept["value"] == metrics[0]["val/response_length"]
    assert kept["texts"] == completions[:3]
    shown = capsys.readouterr().err.replace("\n", " ")
    assert f"warning: val/response_length: {kept['value']:.4g}, --alert {condition!r}; at step 1:" in shown
    assert repr(completions[0]) in shown


def test_supervised_stages_report_too_and_none_is_silent(places, tmp_path, stub):
    fit(places, tmp_path / "a", report_to=["stub"])
    (run,) = stub.runs
    assert [step for step, values in run.logged if "loss" in values] == [1, 2, 3, 4]
    assert run.finished
    assert not (tmp_path / "a" / "tensorboard").exists()
    fit(places, tmp_path / "b", report_to=["none"])
    assert len(stub.runs) == 1
    assert len(read_metrics(tmp_path / "b")) == 4
    fit(places, tmp_path / "c")
    assert (tmp_path / "c" / "tensorboard").is_dir()


def test_a_tracker_with_tables_gets_a_table(tmp_path, stub, monkeypatch):
    found = []
    monkeypatch.setattr(stub, "log_table", lambda self, *args, **options: found.append((args, options)), raising=False)
    with RunLog(tmp_path, 1, "x", report_to=["stub"]) as log:
        log.completions(7, ROWS)
    table = {"columns": ["prompt", "completion", "score"], "data": [["a|b", "line\nline", 0.5]], "step": 7}
    assert found == [(("completions",), table)]


def test_cells_stay_in_their_row():
    assert trackers.markdown(ROWS) == "prompt|completion|score\n---|---|---\na\\|b|line line|0.5"


def test_trackers_that_cannot_be_had_are_refused_before_anything_is_written(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    for names, reason in {
        ("wandb",): "--report_to wandb: the package is not installed; `pip install wandb` installs it",
        ("tensorboard", "trackio"): "--report_to trackio: the package is not installed",
        ("paper",): "--report_to paper: it takes none, aim,",
        ("none", "tensorboard"): "--report_to none: nothing else goes with it",
    }.items():
        assert ppo(places, tmp_path / "out", "--report_to", *names) == 2
        assert reason in capsys.readouterr().err
        with pytest.raises(UserError) as error:
            fit(places, tmp_path / "out", report_to=list(names))
        assert reason in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_tensorboard_its_default_is_passed_over(monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    assert trackers.chosen_trackers(["tensorboard"]) == []


def test_a_tracker_that_fails_to_start_is_one_sentence(places, tmp_path, stub, monkeypatch, capsys):
    def fail(self):
        raise ConnectionError("no login\nand a long story")

    monkeypatch.setattr(stub, "start", fail)
    assert ppo(places, tmp_path, "--report_to", "stub") == 2
    assert capsys.readouterr().err.strip().endswith("error: --report_to stub: it could not be started: no login")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is optional, and not installed")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with RunLog(tmp_path, 1, "x", report_to=["wandb"], options=asdict(sft.Config(model="m"))) as log:
        log.step(1, {"loss": 0.5})
        log.completions(1, ROWS)
        log.alert(1, {"metric": "loss"}, "loss", "loss is high")
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is optional, and not installed")
def test_trackio_local(tmp_path):
    import trackio

    with RunLog(tmp_path, 1, "x", report_to=["trackio"], options=asdict(sft.Config(model="m"))) as log:
        log.step(1, {"loss": 0.5})
        log.completions(1, ROWS)
        log.alert(1, {"metric": "loss"}, "loss", "loss is high")
    (run,) = [run for run in trackio.Api().runs("rlhf") if run.name == str(tmp_path)]
    assert run.config["model"] == "m"
    assert [(alert["title"], alert["text"], alert["step"]) for alert in run.alerts()] == [("loss", "loss is high", 1)]


# Alerts


def test_an_alert_is_given_when_its_bound_is_crossed_and_again_after_it_was_kept():
    alerts = Alerts(["kl>2", "loss<0.5"])
    found = [[alert.metric for alert in alerts.check({"kl": kl, "loss": 1.0})] for kl in (1.0, 3.0, 4.0, 2.0, 2.5)]
    assert found == [[], ["kl"], [], [], ["kl"]]
    (alert,) = alerts.check({"kl": 0.0, "loss": 0.25})
    assert (alert.metric, alert.value, alert.reason) == ("loss", 0.25, "0.25, --alert 'loss<0.5'")


def test_a_metric_that_is_not_a_number_is_an_alert():
    (alert,) = Alerts(["kl>2"]).check({"kl": math.nan})
    assert math.isnan(alert.value)


def test_a_change_is_against_the_first_step_a_resumed_runs_too():
    alerts = Alerts(["change in length>5"])
    assert not alerts.check({"length": 10.0})
    assert not alerts.check({"length": 15.0})
    (alert,) = alerts.check({"length": 16.0})
    assert alert.value == 6.0
    resumed = Alerts(["change in length>5"], [{"length": 10.0}, {"length": 12.0}])
    assert not resumed.check({"length": 15.0})
    assert resumed.check({"length": 16.0})


def test_a_resumed_run_does_not_give_an_alert_again():
    past = [{"kl": 1.0}, {"kl": 3.0}]
    resumed = Alerts(["kl>2"], past)
    assert [len(resumed.check({"kl": kl})) for kl in (4.0, 1.0, 3.0)] == [0, 0, 1]
    assert len(Alerts(["kl>2"], [*past, {"kl": 1.0}]).check({"kl": 3.0})) == 1


def test_an_unknown_metric_is_refused_at_the_first_step():
    with pytest.raises(UserError, match="no metric 'objective/k'; there are objective/kl"):
        Alerts(["objective/k>1"]).check({"objective/kl": 0.0})
    later = Alerts(["heldout/loss>1"])
    assert later.check({"loss": 2.0}) == []
    assert later.check({"heldout/loss": 2.0})


def test_stop_on_alert_ends_ppo_and_saves_the_policy(places, tmp_path):
    condition = ["--alert", "episode>=8", "--stop_on_alert"]
    assert ppo(places, tmp_path, *condition) == 0
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "model.safetensors").exists()


def test_stop_on_alert_ends_a_supervised_stage(places, tmp_path, capsys):
    fit(places, tmp_path, alert=["epoch>0.4"], stop_on_alert=True)
    assert len(read_metrics(tmp_path)) == 2
    (kept,) = records(tmp_path / "alerts.jsonl")
    assert (kept["step"], kept["metric"], len(kept["texts"])) == (2, "epoch", 3)
    assert all(" day" in text for text in kept["texts"])
    assert "stopped at step 2 of 4: epoch: 0.5, --alert 'epoch>0.4'" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").exists()


def test_a_stop_is_kept_though_sigterm_comes_in_the_same_step(places, tmp_path, monkeypatch):
    """It would be lost: the resumed run has given the alert already, and goes on."""

    def terminated(saves):
        flag = StopRequest(saves)
        flag.code = 143
        return nullcontext(flag)

    for module in (supervised, ppo_module):
        monkeypatch.setattr(module, "stop_on_signals", terminated)
    fit(places, tmp_path / "fit", alert=["epoch>0"], stop_on_alert=True)
    assert ppo(places, tmp_path / "ppo", "--alert", "episode>0", "--stop_on_alert") == 0
    for name in ("fit", "ppo"):
        assert len(read_metrics(tmp_path / name)) == 1
        assert (tmp_path / name / "model.safetensors").exists()
    with pytest.raises(SystemExit) as left:
        fit(places, tmp_path / "left", alert=["epoch>9"], stop_on_alert=True)
    assert left.value.code == 143


def test_a_run_goes_on_after_its_alert_with_other_trackers_and_conditions(places, tmp_path, stub):
    length = "val/response_length>0"
    kept = ["--save_every", "1", "--alert", length]
    assert ppo(places, tmp_path, *kept, "--stop_on_alert", "--report_to", "none") == 0
    assert len(read_metrics(tmp_path)) == 1
    assert ppo(places, tmp_path, *kept, "episode>=12", "--resume", "--report_to", "stub") == 0
    assert len(read_metrics(tmp_path)) == 3
    assert len(stub.runs) == 1
    given = [(record["step"], record["metric"]) for record in records(tmp_path / "alerts.jsonl")]
    assert [alert for alert in given if alert[1] in ("val/response_length", "episode")] == [
        (1, "val/response_length"),
        (3, "episode"),
    ]


def test_a_run_that_stopped_and_was_killed_while_saving_is_only_finished_by_a_resume(places, tmp_path, monkeypatch):
    stop = ["--alert", "episode>=8", "--stop_on_alert", "--save_every", "1"]
    with monkeypatch.context() as patch:
        for module in (ppo_module, sft):
            patch.setattr(module, "finish", killed)
        assert ppo(places, tmp_path / "ppo", *stop) == 130
        with pytest.raises(KeyboardInterrupt):
            fit(places, tmp_path / "fit", alert=["epoch>0.4"], stop_on_alert=True, save_every=1)
    assert ppo(places, tmp_path / "ppo", *stop, "--resume") == 0
    fit(places, tmp_path / "fit", alert=["epoch>0.4"], stop_on_alert=True, save_every=1, resume=True)
    for name in ("fit", "ppo"):
        assert [record["step"] for record in read_metrics(tmp_path / name)] == [1, 2]
        assert (tmp_path / name / "model.safetensors").exists()
    assert ppo(places, tmp_path / "ppo", "--save_every", "1", "--resume") == 0  # told to go on
    assert len(read_metrics(tmp_path / "ppo")) == 3


def killed(*_, **__):
    raise KeyboardInterrupt


class Told(ProcessGroupInfo):
    """A rank that hears from rank 0 whether to stop."""

    def broadcast_object(self, value):
        return "loss: said rank 0" if self.stop else None


@pytest.mark.parametrize("stop", [True, False])
def test_rank_0_decides_whether_an_alert_stops_a_supervised_stage(places, tmp_path, monkeypatch, stop, capsys):
    monkeypatch.setattr(Told, "stop", stop, raising=False)
    monkeypatch.setattr(supervised, "distributed_context", Told)
    fit(places, tmp_path, alert=["epoch>9" if stop else "epoch>0.4"], stop_on_alert=True)
    assert len(read_metrics(tmp_path)) == (1 if stop else 4)
    assert ("stopped at step 1 of 4: loss: said rank 0" in capsys.readouterr().err) == stop


@pytest.mark.parametrize("condition", ["kl", "kl>", "kl=2"])
def test_what_is_no_condition_is_refused(places, tmp_path, condition, capsys):
    assert ppo(places, tmp_path / "out", "--alert", condition) == 2
    assert f"--alert {condition!r}: expected a measure, one of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_drops_what_will_be_repeated(tmp_path):
    with RunLog(tmp_path, 3, "x") as log:
        for step in (1, 2, 3):
            log.step(step, {"loss": 1.0})
            log.completions(step, ROWS)
            log.alert(step, {"metric": "loss"}, "title", "message")
    with RunLog(tmp_path, 3, "x", start=1):
        pass
    for name in ("metrics", "completions", "alerts"):
        kept = [json.loads(line)["step"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert kept == [1]


def test_separators_that_json_lets_stand_in_a_text_do_not_end_a_line(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    with RunLog(tmp_path, 3, "x") as log:
        for step in (1, 2, 3):
            log.completions(step, [{"prompt": text, "completion": text}])
            log.alert(step, {"metric": f"m{step}", "texts": [text]}, "title", "message")
    with RunLog(tmp_path, 3, "x", start=2):
        pass
    assert records(tmp_path / "completions.jsonl") == [
        {"step": step, "prompt": text, "completion": text} for step in (1, 2)
    ]
    assert verify_reward.warned(tmp_path, "m2") == 2
    assert verify_reward.warned(tmp_path, "m3") == 0


def test_tensorboard_shows_every_step_once_after_a_resume_and_one_run_after_another(tmp_path):
    def report(steps, value, start=0):
        with RunLog(tmp_path, 9, "x", report_to=["tensorboard"], start=start) as log:
            for step in steps:
                log.step(step, {"loss": value})

    def shown():
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
        return [(event.step, event.value) for event in events]

    report(range(1, 6), 1.0)
    report(range(4, 7), 2.0, start=3)
    assert shown() == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    report(range(1, 3), 3.0)  # with --overwrite
    assert shown() == [(1, 3.0), (2, 3.0)]


def test_metrics_that_are_not_finite_are_null_and_read_as_nan(tmp_path):
    with RunLog(tmp_path, 1, "x") as log:
        log.step(1, {"loss": math.inf, "lr": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "lr": 1.0}\n'
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_a_full_disk_is_told_with_the_file(tmp_path):
    log = RunLog(tmp_path, 1, "x")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught, log:
        log.step(1, {"loss": 1.0})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_what_does_not_fit_on_a_disk_leaves_the_file_as_it_was(tmp_path):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 12:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(bytes(data)[:3])

    with Full(tmp_path / "file", "ab+") as file:
        write_whole(file, b"0123456789")
        with pytest.raises(OSError, match="No space"):
            write_whole(file, b"abcdefghij")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_long_run_keeps_its_metrics_in_little_memory():
    rows = [{f"name/{i}": float(i * step) for i in range(40)} | {"episode": 64 * step} for step in range(50)]
    history = History(dict(row) for row in rows)
    history[-1]["later"] = 1.0  # the newest may still grow
    assert list(history) == [*rows[:-1], {**rows[-1], "later": 1.0}]
    assert history[-3:-1] == rows[-3:-1]
    assert [type(history[3][name]) for name in ("name/3", "episode")] == [float, int]
    tracemalloc.start()
    for step in range(200):
        history.append({f"name/{i}": float(i + step + 0.5) for i in range(40)})
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 200 * 1000  # bytes; as dicts they were 3,700 a step
