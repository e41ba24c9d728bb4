"""`rlhf eval`: any number of policies on the same prompts: toxicity, reward, KL, length, diversity, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base import shared
from rlhf_trainer.base.conditions import check_gates, parse_gates, short
from rlhf_trainer.base.config import option, require, save_config
from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import resolve_device
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import write_text
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.stages import read_shown_prompts
from rlhf_trainer.judging.judges import KINDS, QUESTION, Judge, load_judge
from rlhf_trainer.judging.rewards import RewardFunction, is_function, label_index, load_function, load_reward, scores_of
from rlhf_trainer.judging.win_rates import preferred_by_judge, wins
from rlhf_trainer.models.adapters import score_head
from rlhf_trainer.models.loading import load_causal, load_reward_model, load_tokenizer, on_device
from rlhf_trainer.models.scoring import classifier_outputs
from rlhf_trainer.reports.estimates import distinct, perplexity, perplexity_change
from rlhf_trainer.reports.intervals import (
    Values,
    bootstrap_sums,
    estimate,
    estimate_change,
    jackknife,
    renumbered,
    units_of,
)
from rlhf_trainer.reports.page import print_report, write_or_warn, write_report
from rlhf_trainer.sampling.responses import exact_kl, token_outputs
from rlhf_trainer.sampling.rollout import encode_prompts, generate
from rlhf_trainer.training.runlog import RunLog

SUMMARY = "Compare policies on the same prompts: measures with 95 % intervals, completions, an HTML report."
EXAMPLE = (
    "rlhf eval --before runs/sft --after runs/ppo --prompts heldout.jsonl --reward runs/reward "
    "--toxicity classifier_folder --toxicity_label toxic --output_dir runs/eval"
)


@dataclass
class EvalConfig:
    before: str = option("", "folder of the policy that the others are compared with; KL is measured to it")
    after: list[str] = option([], "folders of one or more other policies; `name=folder` names one in the report")
    prompts: str = shared.prompts()
    output_dir: str = option("", "folder for eval.json, completions.jsonl and report.html")
    toxicity: str | None = option(
        None, "classifier folder (see toxicity_label), or file.py:function, or package.module:function; lower is better"
    )
    toxicity_label: str | None = option(None, "class of the toxicity classifier whose mean probability is reported")
    reward: str | None = shared.reward(None)
    reward_label: str | None = shared.reward_label()
    reward_timeout: float | None = shared.reward_timeout()
    reward_workers: int = shared.reward_workers()
    reward_completion_only: bool = shared.reward_completion_only()
    measures: list[str] = option([], "further measures, name=file.py:function or name=package.module:function")
    judge: str | None = option(None, f"who says which of two answers is better: {KINDS}")
    judge_question: str = option(QUESTION, "what a model or server is asked about two answers")
    fail_if: list[str] = option(
        [],
        "exit code 1 if this holds for a policy of --after: 'toxicity>0.05', 'kl>10', 'change in reward<0'; with @95 "
        "after it, 'toxicity>0.05 @95', if it may hold: if the 95 % interval reaches over the bound",
    )
    n: int = shared.n(1)
    completion_only: bool = option(False, "show the toxicity classifier the completion without its prompt")
    max_prompts: int = option(256, "how many prompts of the file are used, from its beginning")
    max_new_tokens: int = shared.max_new_tokens()
    temperature: float = option(1.0, "sampling temperature; the KL is between the tempered policies")
    stop_token: str | None = shared.stop_token()
    batch_size: int = option(64, "prompts per forward pass")
    bootstrap: int = shared.bootstrap()
    seed: int = option(0, "seed of sampling and bootstrap")
    device: str = shared.device()
    pad_token: str | None = shared.pad_token()
    trust_remote_code: bool = shared.trust_remote_code()


Config = EvalConfig
PERPLEXITY = "perplexity (under the first)"
SILENT = "no verdict of the judge"  # these prompts are left out of the win rate
KL, SAMPLED_KL, LENGTH = "KL (nats)", "KL of the sampled tokens (nats)", "length (tokens)"


@dataclass
class EvalResult:
    """What `evaluate` returns: eval.json's figures, each prompt's completions and scores, whether every gate passed."""

    figures: dict[str, Any]
    samples: list[dict[str, Any]]
    passed: bool
    output_dir: str  # "": nothing was written


@dataclass
class Answers:
    """A policy's completions [N]: tokens, whether they ended, KL to the reference (tempered) and -log ref, in nats."""

    completions: list[str]
    lengths: Values
    ended: Values
    kl: Values  # over the whole vocabulary at each sampled state
    log_ratios: Values  # log pi - log ref of the sampled tokens: the same mean, more noise
    surprise: Values  # at temperature 1, whatever the sampling temperature

    @property
    def sums(self) -> Values:
        """[2, N]: what perplexity sums up, nats and tokens of each completion."""
        return np.stack([self.surprise, self.lengths])


def answer(
    cfg: EvalConfig,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: Any,
    prompts: list[str],
    log: RunLog | None,
) -> Answers:
    """Sample a completion for each of the prompts and compare policy and reference, token by token."""
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(cfg.seed)
    sampling = {name: getattr(cfg, name) for name in ("max_new_tokens", "temperature", "stop_token")}
    completions: list[str] = []
    columns: list[list[float]] = [[], [], [], [], []]
    for start in range(0, len(prompts), cfg.batch_size):
        batch = prompts[start : start + cfg.batch_size]
        rollout = generate(policy, tokenizer, batch, generator=generator, **sampling)
        rows = torch.arange(len(batch), device=rollout.ids.device)
        with torch.no_grad():
            heads: list[dict[str, Any]] = []
            logprobs, _, _ = token_outputs(policy, None, rollout, rows, cfg.temperature, keep=heads)
            ref_logprobs, _, _ = token_outputs(reference, None, rollout, rows, cfg.temperature, keep=heads)
            log_ratios = logprobs - ref_logprobs
            kl = exact_kl(heads[0], heads[1], cfg.temperature, log_ratios)
            plain = ref_logprobs if cfg.temperature == 1 else token_outputs(reference, None, rollout, rows, 1.0)[0]
        completions += rollout.completions
        found = (rollout.response_mask.sum(-1), rollout.ended, kl.sum(-1), log_ratios.sum(-1), -plain.sum(-1))
        for column, values in zip(columns, found, strict=True):
            column += values.tolist()
        if log is not None:
            log.progress.advance(log.task, len(batch))
    return Answers(completions, *(np.array(column, dtype=np.float64) for column in columns))


def measure_all(
    answers: Answers, prompts: list[str], scorers: dict[str, RewardFunction], reference: bool
) -> dict[str, Values]:
    """Every measure that is a mean over prompts: name -> values [N]."""
    found = {
        name: scores_of(scorer, prompts, answers.completions, name).double().numpy() for name, scorer in scorers.items()
    }
    nothing = np.zeros(len(prompts))
    found[KL], found[SAMPLED_KL] = (nothing, nothing) if reference else (answers.kl, answers.log_ratios)
    found[LENGTH] = answers.lengths
    found["ended by itself"] = answers.ended
    return found


def win_rates(
    prompts: list[str], values: dict[str, dict[str, Values]], texts: dict[str, list[str]], name: str, judge: Any
) -> dict[str, Values]:
    """Whether the policy's answer beats the first policy's to the same prompt [N], by reward and by judge."""
    first, found = next(iter(values)), {}
    if "reward" in values[name]:
        found["win rate by reward"] = wins(values[name]["reward"], values[first]["reward"])
    if judge is not None:
        against_itself = np.full(len(prompts), 0.5)
        found["win rate by judge"] = (
            against_itself if name == first else preferred_by_judge(judge, prompts, texts[name], texts[first])
        )
        found[SILENT] = np.isnan(found["win rate by judge"]).astype(np.float64)
    return found


def known_measures(cfg: EvalConfig, scorers: Iterable[str] = (), judge: Judge | None = None) -> list[str]:
    """The names of all measures that a run with these options, scorers and judge has."""
    named = [*(entry.partition("=")[0] for entry in cfg.measures), *scorers]
    own = [KL, SAMPLED_KL, PERPLEXITY, LENGTH, "ended by itself", "distinct-1", "distinct-2"]
    if cfg.toxicity:
        own.append("toxicity")
    if cfg.reward:
        own.append("reward")
    if cfg.reward or "reward" in named:
        own.append("win rate by reward")
    return [*own, *named, *(["win rate by judge", SILENT] if cfg.judge or judge else [])]


def compare(
    cfg: EvalConfig, prompts: list[str], values: dict[str, dict[str, Values]], answers: dict[str, Answers]
) -> dict[str, Any]:
    """{"policies", "changes"}: estimates of every measure for each policy, and its paired change against the first."""
    first, units = next(iter(values)), units_of(prompts)
    options: dict[str, Any] = {"resamples": cfg.bootstrap, "seed": cfg.seed, "units": units}
    policies: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for name, measures in values.items():
        shares = {key: False if key in (KL, SAMPLED_KL, LENGTH) else None for key in measures}
        there = {key: ~np.isnan(column) for key, column in measures.items()}  # a judge may give no verdict
        estimates = {
            key: estimate(column[there[key]], **options | {"units": renumbered(units[there[key]])}, share=shares[key])
            for key, column in measures.items()
        }
        estimates[PERPLEXITY] = bootstrap_sums(perplexity, answers[name].sums, **options)
        diversity = {f"distinct-{n}": distinct(answers[name].completions, n, units) for n in (1, 2)}
        estimates |= {key: jackknife(*pair, limits=(0.0, 1.0)) for key, pair in diversity.items()}
        policies[name] = {"measures": estimates}
        if name == first:
            first_diversity = diversity
            for key in estimates.keys() & {KL, SAMPLED_KL, SILENT, "win rate by reward", "win rate by judge"}:
                estimates[key] |= {"low": estimates[key]["mean"], "high": estimates[key]["mean"]}  # known: to itself
            continue
        changes[name] = {
            key: estimate_change(
                column[there[key]],
                values[first][key][there[key]],
                **options | {"units": renumbered(units[there[key]])},
                share=shares[key],
            )
            for key, column in measures.items()
        }
        both = np.concatenate([answers[name].sums, answers[first].sums])
        changes[name][PERPLEXITY] = bootstrap_sums(perplexity_change, both, **options)
        for key, (value, left_out) in diversity.items():
            first_value, first_left_out = first_diversity[key]
            changes[name][key] = jackknife(value - first_value, left_out - first_left_out, limits=(-1.0, 1.0))
    return {"policies": policies, "changes": changes}


def policy_folders(cfg: EvalConfig) -> dict[str, str]:
    """Name in the report -> folder; the one to compare with comes first."""
    folders = {}
    for entry in (cfg.before, *cfg.after):
        name, _, folder = entry.rpartition("=")
        name = name or Path(folder).name
        if name in folders:
            raise UserError(f"two policies are called {name!r}; name them apart with --after name=folder")
        folders[name] = folder
    return folders


def load_toxicity(cfg: EvalConfig, device: torch.device) -> RewardFunction:
    """A function as it is; of a classifier the probability of cfg.toxicity_label."""
    assert cfg.toxicity is not None
    if is_function(cfg.toxicity):
        return load_function(cfg.toxicity)
    model = on_device(load_reward_model(cfg.toxicity, trust_remote_code=cfg.trust_remote_code), device)
    tokenizer = load_tokenizer(
        cfg.toxicity, cfg.pad_token, cfg.trust_remote_code, generates=score_head(model) is not None
    )
    index = label_index(model.config, cfg.toxicity_label, cfg.toxicity, "--toxicity_label")
    independent = model.config.num_labels == 1 or model.config.problem_type == "multi_label_classification"

    def probability(prompts: list[str], completions: list[str]) -> list[float]:
        shown = [""] * len(prompts) if cfg.completion_only else prompts
        outputs = classifier_outputs(model, tokenizer, shown, completions, batch_size=cfg.batch_size)
        return (outputs.sigmoid() if independent else outputs.softmax(-1))[:, index].tolist()

    return probability


def load_own_judge(cfg: EvalConfig, device: torch.device) -> Judge:
    options: dict[str, Any] = {"pad_token": cfg.pad_token, "trust_remote_code": cfg.trust_remote_code}
    return load_judge(cfg.judge or "", question=cfg.judge_question, device=device, **options)


def load_scorers(cfg: EvalConfig, device: torch.device) -> dict[str, RewardFunction]:
    """Name of the measure -> function; toxicity first."""
    options: dict[str, Any] = {"device": device, "pad_token": cfg.pad_token, "trust_remote_code": cfg.trust_remote_code}
    scorers: dict[str, RewardFunction] = {}
    if cfg.toxicity:
        scorers["toxicity"] = load_toxicity(cfg, device)
    if cfg.reward:
        shown: dict[str, Any] = {"label": cfg.reward_label, "completion_only": cfg.reward_completion_only}
        limits: dict[str, Any] = {"timeout": cfg.reward_timeout, "workers": cfg.reward_workers}
        scorers["reward"] = load_reward(cfg.reward, **shown, **limits, **options)
    for entry in cfg.measures:
        name, equals, source = entry.partition("=")
        if not equals or not name or not source:
            raise UserError(f"--measures {entry}: expected name=file.py:function or name=package.module:function")
        scorers[name] = load_reward(source, **options)
    return scorers


def measure_policies(
    cfg: EvalConfig,
    policies: Mapping[str, PreTrainedModel] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: list[str] | None = None,
    scorers: Mapping[str, RewardFunction] | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Answer the prompts with every policy and measure; returns what eval.json holds, and "samples"."""
    device = resolve_device(cfg.device)
    folders = policy_folders(cfg) if policies is None else dict.fromkeys(policies, "")
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.before, cfg.pad_token, cfg.trust_remote_code)
    given = read_shown_prompts(cfg.prompts, tokenizer) if prompts is None else [(text, text) for text in prompts]
    given = [pair for pair in given[: cfg.max_prompts] for _ in range(cfg.n)]
    prompts, asked = ([pair[side] for pair in given] for side in (0, 1))  # asked: as a judge reads
    scorers = load_scorers(cfg, device) | dict(scorers or {})
    judge = load_own_judge(cfg, device) if judge is None and cfg.judge else judge
    values: dict[str, dict[str, Values]] = {}
    answers: dict[str, Answers] = {}
    reference = None
    logging = RunLog(cfg.output_dir, len(prompts) * len(folders), "eval") if cfg.output_dir else nullcontext()
    with logging as log:
        for name, folder in folders.items():
            own = tokenizer if policies else load_tokenizer(folder, cfg.pad_token, cfg.trust_remote_code)
            if own.get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"{folder} and {cfg.before} have different vocabularies; a KL between them has no meaning"
                )
            options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
            policy = policies[name] if policies else load_causal(folder, own, **options)
            policy = on_device(policy, device)
            reference = reference if reference is not None else policy
            encode_prompts(policy, own, prompts, cfg.max_new_tokens)
            answers[name] = answer(cfg, policy, reference, own, prompts, log)
            values[name] = measure_all(answers[name], prompts, scorers, policy is reference)
            texts = {known: each.completions for known, each in answers.items()}
            values[name] |= win_rates(asked, values, texts, name, judge)
    result: dict[str, Any] = {"prompts": len(set(prompts)), "folders": folders, "config": asdict(cfg)}
    result |= compare(cfg, prompts, values, answers)
    result["gates"] = check_gates(parse_gates(cfg.fail_if, known_measures(cfg, scorers, judge)), result)
    result["samples"] = sample_records(prompts, values, answers)
    return result


def sample_records(
    prompts: list[str], values: dict[str, dict[str, Values]], answers: dict[str, Answers]
) -> list[dict[str, Any]]:
    """For each prompt the completion of every policy, and that completion's measures."""
    columns = {name: values[name] | {PERPLEXITY: perplexity(answers[name].sums.T)} for name in values}
    return [
        {
            "prompt": prompt,
            "completions": {name: answers[name].completions[i] for name in answers},
            "measures": {name: {key: number(column[i]) for key, column in columns[name].items()} for name in columns},
        }
        for i, prompt in enumerate(prompts)
    ]


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def write_result(result: dict[str, Any], folder: str | Path) -> None:
    """eval.json with the figures, completions.jsonl with every completion and its scores."""
    figures = {key: value for key, value in result.items() if key != "samples"}
    write_jsonl(Path(folder) / "completions.jsonl", result["samples"])
    write_text(Path(folder) / "eval.json", dumps(figures, indent=2) + "\n")


def validate_numbers(cfg: EvalConfig) -> None:
    for name in ("n", "max_prompts", "max_new_tokens", "batch_size", "bootstrap"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if not cfg.temperature > 0:
        raise UserError(f"--temperature {cfg.temperature}: must be more than 0")


def evaluate(
    cfg: EvalConfig,
    *,
    policies: Mapping[str, PreTrainedModel] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: list[str] | None = None,
    scorers: Mapping[str, RewardFunction] | None = None,
    judge: Judge | None = None,
) -> EvalResult:
    """Compare policies on the same prompts. What is not passed as an object is loaded from what cfg names.

    Args:
        policies, tokenizer: name in the report -> policy, the one that the others are compared with first; and the
            tokenizer of all of them.
        prompts: the texts to answer.
        scorers: name -> `(prompts, completions) -> scores`, measured besides what cfg names; "reward" gives win rates.
        judge: `(prompts, answers, other answers) -> probabilities` that each answer is the better one.

    Without cfg.output_dir nothing is written.

    Raises:
        UserError: bad input, one sentence; different vocabularies; a gate on a measure that there is not.
    """
    given = {"before": policies, "after": policies, "prompts": prompts}
    require(cfg, *(name for name, one in given.items() if one is None))
    if policies is not None and tokenizer is None:
        raise UserError("policies given as objects need their tokenizer")
    validate_numbers(cfg)
    measures = known_measures(cfg, scorers or {}, judge)
    twice = next((name for name in measures if [*map(short, measures)].count(short(name)) > 1), None)
    if twice is not None:  # one of them would be lost
        raise UserError(f"two measures are called {twice!r}; --measures and scorers need names of their own")
    parse_gates(cfg.fail_if, measures)
    found = measure_policies(cfg, policies, tokenizer, prompts, scorers, judge)
    if cfg.output_dir:
        save_config(cfg, cfg.output_dir)
        write_result(found, cfg.output_dir)
        page = Path(cfg.output_dir) / "report.html"
        write_or_warn(lambda: write_report(page, found, title="Evaluation"), str(page))
    passed = not any(record["failed"] for record in found["gates"])
    return EvalResult(found, found["samples"], passed, cfg.output_dir)


def run(cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate, write eval.json, completions.jsonl and report.html, print the table."""
    require(cfg, "before", "after", "prompts", "output_dir")
    result = evaluate(cfg)
    print_report(result.figures)
    print(f"report: {Path(cfg.output_dir) / 'report.html'}")
    for record in result.figures["gates"]:
        outcome = "FAILED" if record["failed"] else "passed"
        print(f"{outcome}: {record['policy']}, --fail_if {record['gate']!r}, is {record['value']:.4g}")
        if record["undecided"]:
            say(
                f"warning: --fail_if {record['gate']!r}: the interval of {record['policy']} has the bound in it; more "
                "prompts or --n would tell, and '@95' after the condition fails where the interval reaches over it"
            )
    return result.figures | {"passed": result.passed}
