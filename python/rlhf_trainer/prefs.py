"""`rlhf prefs`: rankings, scores and pairs of any known format -> one file of preference pairs, and a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_trainer.base import shared
from rlhf_trainer.base.config import option, refuse_overwriting, require
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import write_text
from rlhf_trainer.data.agreement import Agreement, agreement, table
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.formats import MARKERS, Options
from rlhf_trainer.data.rankings import RankedPrompt, VoteTally, voted_pairs
from rlhf_trainer.data.readers import FORMATS, Preferences, read_preferences
from rlhf_trainer.data.records import Pair, check_pairs
from rlhf_trainer.labelling import instructions as prefs_instructions
from rlhf_trainer.models.loading import load_tokenizer

_KINDS = "\n".join(f"  {known.name:12} {known.what}" for known in FORMATS.values())
SUMMARY = f"""Turn rankings by several labellers, scores, thumbs or pairs into one file of preference pairs.

Files: JSON lines, a JSON array, a table with a header (comma, tab, semicolon or bar), all also as .gz; Parquet; or any
name or folder that the datasets library loads. Formats, recognised from the first record or named with --format:
{_KINDS}

Every two completions of a prompt are put to a vote of its labellers; the preferred one is written first. The report
gives Krippendorff's alpha (ordinal), each labeller's agreement with the others, and what became of all comparisons.

  rlhf prefs instructions --help    writes instructions for labellers
  rlhf generate, rlhf label         make completions to rank, and rank them in the browser"""
EXAMPLE = (
    "rlhf prefs rankings.jsonl --check\n"
    "  rlhf prefs rankings.jsonl --output pairs.jsonl --ties half\n"
    "  rlhf prefs table.csv --columns prompt=question chosen=best rejected=worst --output pairs.jsonl"
)
POSITIONAL = "data"  # `rlhf prefs FILE ...` is `rlhf prefs --data FILE ...`
COMMANDS = {"instructions": prefs_instructions}


@dataclass
class PrefsConfig:
    data: list[str] = option([], "files, folders or data set names; rankings of the same completions are merged")
    output: str = option("", "file of pairs to write: {prompt, chosen, rejected} a line, `label` 0.5 for a tie")
    check: bool = option(False, "only print what was understood, with three examples; write nothing")
    format: str = option("auto", f"auto, or one of {', '.join(FORMATS)}")
    columns: list[str] = option(
        [], "ours=theirs: which column is prompt, chosen, rejected, completion, score, labeller; or completions=A,B"
    )
    split: str = option("train", "split of a data set")
    model: str | None = option(None, "model folder whose chat template writes chat messages as text")
    answer_marker: str | None = option(
        None, "text after which the answer begins in transcripts without a prompt; else those of common chat formats"
    )
    ties: Literal["drop", "half"] = option("drop", "pairs that the majority calls a tie: drop, or keep with label 0.5")
    fails: Literal["lose", "remove"] = option(
        "lose", 'completions marked "F": lose to every ranked one, or remove those that most labellers marked'
    )
    without: list[str] = option([], "labellers whose rankings and scores are left out")
    strict: bool = option(
        False, "an empty prompt or completion, chosen equal to rejected, a duplicate or a contradiction is an error"
    )
    trust_remote_code: bool = shared.trust_remote_code()


Config = PrefsConfig


@dataclass
class PrefsResult:
    """Pairs to write, what became of the comparisons, and how far the labellers agree (None without labellers)."""

    pairs: list[Pair]
    read: Preferences
    votes: VoteTally
    agreement: Agreement | None
    ranked: list[RankedPrompt]
    output: str  # "": nothing was written


def read_options(cfg: PrefsConfig) -> Options:
    columns = {}
    for entry in cfg.columns:
        ours, equals, theirs = entry.partition("=")
        if not equals or not ours or not theirs:
            raise UserError(f"--columns {entry}: expected ours=theirs, such as prompt=question")
        columns[ours] = theirs
    tokenizer = load_tokenizer(cfg.model, None, cfg.trust_remote_code, generates=False) if cfg.model else None
    markers = MARKERS if cfg.answer_marker is None else (cfg.answer_marker,)
    return Options(tokenizer, columns, markers)


def make_pairs(cfg: PrefsConfig) -> PrefsResult:
    """Read everything, vote, check the pairs; with cfg.output they are written, the report beside them.

    Raises:
        UserError: a file that cannot be read or understood, a name that is no labeller's, or no pair at all.
    """
    require(cfg, "data")
    result = prepare(cfg)
    if not result.pairs:
        raise UserError(f"{', '.join(cfg.data)}: no pair came of it")
    if cfg.output and not cfg.check:
        write_files(cfg, result)
        result.output = cfg.output
    return result


def prepare(cfg: PrefsConfig) -> PrefsResult:
    """Read everything, vote, check the pairs; nothing is written."""
    if cfg.format not in ("auto", *FORMATS):
        raise UserError(f"--format {cfg.format}: not one of auto, {', '.join(FORMATS)}")
    if not cfg.check:
        refuse_overwriting("output", cfg.output, *cfg.data)
    read = read_preferences(cfg.data, format=cfg.format, split=cfg.split, options=read_options(cfg), strict=cfg.strict)
    kept = [(_leave_out(record, cfg.without), where) for record, where in read.ranked]
    _check_names(cfg.without, read)
    votes = VoteTally()
    voted = ((pair, where) for record, where in kept for pair in voted_pairs(record, votes, cfg.ties, cfg.fails))
    pairs = check_pairs([*read.pairs, *voted])
    ranked = [record for record, _ in kept if record.rankings]
    return PrefsResult(pairs, read, votes, agreement(ranked, cfg.fails) if ranked else None, ranked, "")


def _leave_out(record: RankedPrompt, names: list[str]) -> RankedPrompt:
    return replace(record, rankings=tuple(ranking for ranking in record.rankings if ranking.labeller not in names))


def _check_names(names: list[str], read: Preferences) -> None:
    labellers = {ranking.labeller for record, _ in read.ranked for ranking in record.rankings}
    unknown = next((name for name in names if name not in labellers), None)
    if unknown is not None:
        known = ", ".join(sorted(labellers)[:20]) or "none"
        raise UserError(f"--without {unknown}: no such labeller; they are {known}")


def pair_record(pair: Pair) -> dict[str, Any]:
    """A line of the output: what `read_pairs` reads."""
    record: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if pair.label != 1.0:
        record["label"] = pair.label
    if pair.margin:
        record["margin"] = pair.margin
    return record


def report_lines(result: PrefsResult) -> list[str]:
    """What was read, what the labellers agree on, what became of the comparisons."""
    read, votes, lines = result.read, result.votes, []
    for data_report, kind, count in zip(read.reports, read.formats, read.records, strict=True):
        lines.append(data_report.summary(count, f"records, format {kind}"))
    if result.agreement is not None:
        lines += ["", *agreement_lines(result.agreement, len(result.ranked))]
        lost = votes.comparisons - votes.pairs
        lines += [
            "",
            f"{votes.comparisons} comparisons of {len(result.ranked)} prompts: {votes.pairs} pairs, {lost} lost "
            f"({votes.ties} ties in all, {votes.disagreements} without a majority); "
            f"{votes.failed_completions} completions failed by most",
        ]
    return lines


def agreement_lines(report: Agreement, prompts: int) -> list[str]:
    undefined = report.missing or "undefined (no two labellers judged the same)"
    alpha = undefined if report.alpha is None else f"{report.alpha:.3f}"
    lines = [f"Krippendorff's alpha, ordinal: {alpha}, over {len(report.labellers)} labellers and {prompts} prompts"]
    if report.alpha_without_outliers is not None:
        outliers = ", ".join(one.name for one in report.labellers if one.outlier)
        lines[0] += f"; without {outliers}: {report.alpha_without_outliers:.3f}"
    return lines + table(report)


def example_lines(pairs: list[Pair], count: int = 3) -> list[str]:
    lines = []
    for number, pair in enumerate(pairs[:count], start=1):
        label = "" if pair.label == 1.0 else f"  (label {pair.label:g})"
        lines += ["", f"example {number}{label}"]
        for name in ("prompt", "chosen", "rejected"):
            text = getattr(pair, name)
            # The end of a prompt says where the answer begins; the beginning of an answer says what was cut.
            shown = text if len(text) <= 200 else ("..." + text[-200:] if name == "prompt" else text[:200] + "...")
            lines.append(f"  {name:8} {shown!r}")
    return lines


def run(cfg: PrefsConfig) -> dict[str, Any]:
    """Write `output` and beside it `.report.json`, and print the report; with `check` only print."""
    require(cfg, "data", *([] if cfg.check else ["output"]))
    result = prepare(cfg)
    print("\n".join(report_lines(result)))
    if cfg.check:
        print("\n".join(example_lines(result.pairs)))
    if not result.pairs:
        raise UserError(f"{', '.join(cfg.data)}: no pair came of it")
    if not cfg.check:
        path = write_files(cfg, result)
        say(f"{cfg.output}: {len(result.pairs)} pairs; {path}")
    return {"pairs": len(result.pairs)}


def write_files(cfg: PrefsConfig, result: PrefsResult) -> Path:
    """Write the pairs, and beside them the report, whose path is returned."""
    write_jsonl(cfg.output, map(pair_record, result.pairs))
    path = Path(cfg.output).with_suffix(".report.json")
    write_text(path, dumps(report_record(result), indent=2, ensure_ascii=False) + "\n")
    return path


def report_record(result: PrefsResult) -> dict[str, Any]:
    read = result.read
    files = [
        {"path": str(data_report.path), "format": kind, "records": count, "findings": data_report.lines}
        for data_report, kind, count in zip(read.reports, read.formats, read.records, strict=True)
    ]
    report: dict[str, Any] = {"pairs": len(result.pairs), "files": files}
    if result.agreement is not None:
        votes = asdict(result.votes)
        votes = {key: votes[key] for key in ("comparisons", "pairs", "ties", "disagreements", "failed_completions")}
        report |= {"votes": votes, "agreement": result.agreement.record()}
    return report
