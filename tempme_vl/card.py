"""The card of a saved folder: README.md, with what is known of its model, in the form that the Hugging Face hub reads.

A card ends in a line with the hash of all before it. By that a card of ours is told from one that somebody has written
or changed, which is never overwritten.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tempme_vl.manifest import CARD_FILE

PLACE = "path/to/this/folder"  # in code, until there is a name on the hub
_LAST = "<!-- written by tempme_vl ({digest}); a card that was changed is kept -->\n"
_LAST_LINE = re.compile(re.escape(_LAST).replace(r"\{digest\}", "([0-9a-f]{16})") + r"\Z")


@dataclass(frozen=True)
class Result:
    """A number of a report.

    Attributes:
        dataset, split: what it was measured on, by their names here.
        metric: its name.
        value: in the metric's own unit.
    """

    dataset: str
    split: str
    metric: str
    value: float


@dataclass(frozen=True)
class Card:
    """What is known of a model. What is not known is left out.

    Attributes:
        title: what it is, in words.
        task: the hub's name of what it is for (pipeline_tag).
        facts: a table's rows: names and values.
        code: how it is loaded and used; the folder's name in it is `PLACE`.
        tags: the hub's words to find it by.
        base_model: the hub's name of the model that it was made of.
        results: what a run's report says of it.
    """

    title: str
    task: str
    facts: Mapping[str, str]
    code: str
    tags: tuple[str, ...] = ()
    base_model: str | None = None
    results: tuple[Result, ...] = field(default=())

    def text(self) -> str:
        """The whole file."""
        rows = "".join(f"| {name} | {value} |\n" for name, value in self.facts.items())
        parts = [
            f"---\n{self._header()}\n---\n\n# {self.title}\n\nMade with tempme_vl, which merges the tokens of a video "
            f"while they are encoded.\n\n| | |\n|---|---|\n{rows}\n## Use\n\n```python\n{self.code}```\n"
        ]
        if self.results:
            found = "".join(f"| {r.dataset} | {r.split} | {r.metric} | {r.value:.4g} |\n" for r in self.results)
            parts.append(f"\n## Results\n\n| data set | split | metric | value |\n|---|---|---|---|\n{found}")
        return _signed("".join(parts) + "\n")

    def _header(self) -> str:
        """The YAML that the hub reads."""
        from huggingface_hub import EvalResult, ModelCardData

        results = [
            EvalResult(
                task_type=self.task,
                dataset_type=result.dataset,
                dataset_name=result.dataset,
                dataset_split=result.split,
                metric_type=result.metric,
                metric_value=round(result.value, 4),
            )
            for result in self.results
        ]
        data = ModelCardData(
            library_name="tempme_vl",
            pipeline_tag=self.task,
            tags=["video", "token-merging", *self.tags],
            base_model=self.base_model,
            datasets=sorted({result.dataset for result in self.results}) or None,
            metrics=list(dict.fromkeys(result.metric for result in self.results)) or None,
            model_name=self.title if results else None,
            eval_results=results or None,
        )
        return data.to_yaml()


def write_card(directory: str | Path, card: Card, anyway: bool = False) -> None:
    """Writes README.md, but not over one that somebody has written or changed; write the manifest behind it.

    Args:
        anyway: over whatever is there.
    """
    file = Path(directory) / CARD_FILE
    if anyway or may_write(directory):
        file.write_text(card.text(), encoding="utf-8")


def may_write(directory: str | Path) -> bool:
    """Whether there is no card in a folder, or one of ours as it was written."""
    file = Path(directory) / CARD_FILE
    return not file.exists() or is_own(file.read_text(encoding="utf-8", errors="replace"))


def is_own(text: str) -> bool:
    """Whether a card is as `Card.text` gave it."""
    last = _LAST_LINE.search(text)
    return last is not None and last[1] == _digest(text[: last.start()])


def renamed(text: str, name: str) -> str:
    """A card of ours whose code loads the model by its name on the hub."""
    last = _LAST_LINE.search(text)
    return _signed(text[: last.start() if last else len(text)].replace(PLACE, name))


def _signed(text: str) -> str:
    return text + _LAST.format(digest=_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
