"""What a run leaves behind: the exported model, the report, and what is shown of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from tempme_vl.card import Result, write_card
from tempme_vl.data.reader import broken_videos
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.videoqa import accuracy_by, format_accuracy
from tempme_vl.manifest import write_manifest
from tempme_vl.recipes.loop import Trained
from tempme_vl.recipes.names import BROKEN_VIDEOS
from tempme_vl.recipes.options.shared import RecipeOptions
from tempme_vl.reports import finish, write_json
from tempme_vl.training import distributed
from tempme_vl.training.engine import Trainer
from tempme_vl.tuning import TunableModel

Split: TypeAlias = QASplit | RetrievalSplit

NO_VALIDATION = "no validation split: last epoch"


def cost(model: TunableModel) -> dict[str, Any]:
    """Tokens and GFLOPs of a video, for a report."""
    schedule = model.frontend.schedule
    return {
        "output_tokens": schedule.output_tokens,
        "input_tokens": schedule.input_tokens,
        "gflops": model.gflops(),
    }


def about_run(options: RecipeOptions, trainer: Trainer, trained: Trained, val: Split | None) -> dict[str, Any]:
    """What a report says of a run beside its results.

    Args:
        val: what the best epoch was chosen on, if there was anything.
    """
    return {
        "selected_on": NO_VALIDATION if val is None else val.name,
        "selected_step": trainer.best_step,
        "method": options.method,
        "trainable_params": trainer.trainable_params,
        "seed": options.seed,
        "train_seconds": trained.seconds,
        "train_steps": trainer.step - trained.start_step,
        "ranks": distributed.world_size(),
        "broken_videos": broken_videos(options.output / BROKEN_VIDEOS),
    }


def write_report(options: RecipeOptions, report: dict[str, Any], shown: str, *more: Callable[[], object]) -> None:
    """Prints what is to be shown of a report, and which videos are missing in it; then writes OUTPUT/report.json.

    Args:
        more: write other files.
    """
    if not distributed.is_main():
        return
    chosen = report["selected_on"]
    lines = [f"\n{chosen if chosen == NO_VALIDATION else f'best epoch chosen on {chosen}'}", shown]
    if report["broken_videos"]:
        lines.append(f"{len(report['broken_videos'])} videos could not be read: {options.output / BROKEN_VIDEOS}")
    finish("\n".join(lines), report, options.output / "report.json", *more)


def write_results(options: RecipeOptions, model: Any, split: str, numbers: Mapping[str, float]) -> None:
    """Adds to the card of OUTPUT/best what the test gave, where the data set has a name.

    Args:
        model: the trained one, whose card tells its tuning.
        split: the test split.
        numbers: by the names of the metrics.
    """
    if not distributed.is_main() or options.dataset == "jsonl":
        return
    results = tuple(Result(options.dataset, split, metric, value) for metric, value in numbers.items())
    write_card(options.output / "best", replace(model.card(), results=results))
    write_manifest(options.output / "best")


def write_answers(options: RecipeOptions, report: dict[str, Any], predictions: dict[str, str], test: QASplit) -> None:
    """`write_report` of a model that answers questions, and OUTPUT/predictions.json."""
    shown = [format_accuracy(report)]
    kind = options.source().record.question_kind
    if kind is not None:
        report["by_kind"] = accuracy_by(predictions, test, kind)
        shown += [f"{name:<10}{count:>10}{percent:>12.2f}" for name, (percent, count) in report["by_kind"].items()]
    file = options.output / "predictions.json"
    write_report(options, report, "\n".join(shown), partial(write_json, file, predictions, 0))
