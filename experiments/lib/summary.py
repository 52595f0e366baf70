"""`experiments/results.csv`: all committed results in one table, one row per run and metric.

The table is made of the result files alone: every number below `result` is a metric, named by its path. Where several
seeds were run, rows with the seed `mean` and `sd` hold their mean and standard deviation.
"""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from experiments.lib.files import EXPERIMENTS, Json, read_json, short_name

FILE = EXPERIMENTS / "results.csv"

# Parts of a result that describe a run, or that hold values per item.
SKIPPED = frozenset(
    {"recipe", "resolved", "history", "tokens", "cross_tokens", "rounds", "captions", "places", "flops", "schedule"}
)
# Names under which runs keep the same thing.
METHOD = ("preset", "method")
NAMED = ("setting", "task", "tower", "size", "model", "cost", "benchmark")
NOT_SETTING = frozenset({*METHOD, *NAMED, "r", "seed", "weights", "data", "reducer", "batch"})
INTERVALS = frozenset(
    {"interval", "quartiles", "chosen_quartiles", "other_quartiles", "over_ideal_quartiles", "spread"}
)


@dataclass(frozen=True)
class Row:
    """One metric of one run.

    Attributes:
        study: folder of the study; `-trained` for the runs that train.
        setting: model and data, and what else tells two runs apart (budget, batch, dtype ...).
        method: what is attached.
        r: tokens removed per block; several numbers are those of the blocks.
        seed: of the run; `mean` and `sd` over all seeds; empty where there is none.
        flops_share: multiply-adds over those of the dense model; empty where they were not counted.
        metric: path of the number in the result file.
        value: with 12 digits.
        device: what was measured on.
        commit: of the code, 12 digits.
        file: result file, or folder of the seeds' files, relative to `experiments`.
    """

    study: str
    setting: str
    method: str
    r: str
    seed: str
    flops_share: str
    metric: str
    value: str
    device: str
    commit: str
    file: str


def table(experiments: Path = EXPERIMENTS) -> str:
    """Return the table as CSV, sorted by file."""
    rows = [row for file in result_files(experiments) for row in rows_of(file, experiments)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in [*rows, *over_seeds(rows)])
    return text.getvalue()


def result_files(experiments: Path) -> list[Path]:
    """Return all result files, sorted."""
    files = (file for folder in ("results", "results_trained") for file in experiments.glob(f"*/{folder}/**/*.json"))
    return sorted(files, key=lambda file: file.as_posix())


def rows_of(file: Path, experiments: Path) -> Iterator[Row]:
    """Yield the rows of one result file."""
    content = read_json(file)
    run, name = content["run"], file.relative_to(experiments).as_posix()
    base = Row(
        study=name.split("/")[0] + ("-trained" if "results_trained" in name else ""),
        setting=setting_of(run),
        method=next((str(run[key]) for key in METHOD if key in run), ""),
        r=r_of(run),
        seed="" if run.get("seed") is None else str(run["seed"]),
        flops_share=number(share_of(content["result"])),
        metric="",
        value="",
        device=short_name(content["environment"]),
        commit=str(content["environment"].get("commit") or "")[:12],
        file=name,
    )
    yield from metrics(content["result"], base)
    if "captions" in content["result"]:
        from experiments.retrieval.report import per_photo

        yield replace(base, metric="mean_recall", value=number(100 * float(per_photo(content["result"]).mean())))


def setting_of(run: Json) -> str:
    """Return model and data, and the other scalars of a run as name=value."""
    named = [str(run[key]) for key in NAMED if isinstance(run.get(key), str)]
    others = [
        f"{key}={value}"
        for key, value in run.items()
        if key not in NOT_SETTING and isinstance(value, str | int | float) and "sha256" not in key
    ]
    batch = [f"batch={run['batch']}"] if "rounds" in run and "batch" in run else []
    return " ".join([*named, *batch, *others])


def r_of(run: Json) -> str:
    """Return r, or that of each block."""
    r = run.get("r", (run.get("reducer") or {}).get("r", ""))
    return " ".join(map(str, r)) if isinstance(r, list) else str(r)


def share_of(result: Json) -> float | None:
    """Return the share of the dense model's multiply-adds; None where they were not counted."""
    counted = result.get("gflops", result)
    counted = counted.get("both", counted)  # prompt learning: a photograph with one prompt
    dense, reduced = counted.get("dense"), counted.get("reduced")
    if isinstance(dense, dict) and isinstance(reduced, dict) and "total" in dense:
        dense, reduced = dense["total"], reduced["total"]
    return reduced / dense if isinstance(dense, int | float) and isinstance(reduced, int | float) else None


def metrics(value: Any, base: Row, path: str = "") -> Iterator[Row]:
    """Yield a row for every number below a value."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, int | float):
        yield replace(base, metric=path, value=number(value))
        return
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key in INTERVALS:
                for side, bound in zip(("low", "high"), part, strict=True):
                    yield from metrics(bound, base, ".".join(filter(None, (path, key, side))))
            elif key not in SKIPPED:
                yield from metrics(part, base, f"{path}.{key}" if path else str(key))
    elif path == "rows":
        for part in value:
            yield from listed(part, base)


def listed(row: Json, base: Row) -> Iterator[Row]:
    """Yield the metrics of one row of a result that has several, each of another method or model."""
    words = [str(value) for key, value in row.items() if isinstance(value, str) and key != "method"]
    words += [f"{key}={row[key]}" for key in ("tokens",) if key in row]
    share = row.get("promised", row.get("predicted"))
    base = replace(
        base,
        setting=" ".join([base.setting, *words]),
        method=str(row.get("method", base.method)),
        r=str(row.get("r", base.r)),
        flops_share=number(1 / share) if share else base.flops_share,
    )
    yield from metrics({key: value for key, value in row.items() if key not in ("tokens", "r")}, base)


def over_seeds(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield mean and standard deviation of every metric that differs between the seeds of a run."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        if row.seed:
            folder = row.file.rpartition("/")[0]
            key = replace(row, seed="", value="", file=folder, commit="", device="", flops_share="")
            groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        values = [float(row.value) for row in group]
        if len(set(values)) > 1 and not key.metric.startswith("gflops"):
            same = replace(group[0], file=key.file)
            yield replace(same, seed="mean", value=number(statistics.mean(values)))
            yield replace(same, seed="sd", value=number(statistics.stdev(values)))


def number(value: float | None) -> str:
    """Return a number with 12 digits; nothing for None.

    The last digits of a mean or a deviation differ between versions of Python.
    """
    return "" if value is None else f"{value:.12g}"
