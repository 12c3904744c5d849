"""The cards of models: what each is for, and how it is loaded and used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tempme_vl.card import PLACE, Card
from tempme_vl.configs import tower_name
from tempme_vl.frontend import VisualFrontend
from tempme_vl.tasks.inputs import Inputs, VideoInput
from tempme_vl.tuning import Tuning


def retrieval_card(frontend: VisualFrontend, input: Inputs, tuning: Tuning) -> Card:
    """Of a model that compares texts with videos."""
    code = (
        "from tempme_vl import VideoRetrieval\n\n"
        f'retrieval = VideoRetrieval.from_pretrained("{PLACE}")\n'
        'scores = retrieval.similarity(["a red circle moves left"], ["clip.mp4"])\n'
    )
    title = f"Text-video retrieval: {tower_name(frontend.config)}, {frontend.schedule.method}"
    facts = {**frontend.facts(), **input.facts(), **tuning_facts(tuning, frontend)}
    return Card(title, "feature-extraction", facts, code, ("text-video-retrieval", frontend.schedule.method))


def qa_card(frontend: VisualFrontend, head: str, answers: Sequence[str], input: VideoInput, tuning: Tuning) -> Card:
    """Of a model that answers questions about videos."""
    options = json.dumps([*answers[:2]] or ["a ball", "a cube"], ensure_ascii=False)
    code = (
        "from tempme_vl import VideoQA\n\n"
        f'qa = VideoQA.from_pretrained("{PLACE}")\n'
        f'answer = qa.answer("clip.mp4", "what is shown", options={options})\n'
    )
    title = f"Video question answering: {tower_name(frontend.config)}, {frontend.schedule.method}, {head}"
    known = {"head": head, **({"answers": str(len(answers))} if answers else {})}
    facts = {**frontend.facts(), **known, **input.facts(), **tuning_facts(tuning, frontend)}
    return Card(title, "visual-question-answering", facts, code, ("video-question-answering", frontend.schedule.method))


def tuning_facts(tuning: Tuning, frontend: VisualFrontend) -> dict[str, str]:
    """Rows of a card; none for a model that was loaded, which does not know how it was trained."""
    name = getattr(tuning, "name", None)
    options: Mapping[str, Any] = vars(tuning)
    known = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    added = tuning.cost(frontend.schedule, frontend.shape) / 1e9
    cost = {"GFLOPs of a video with the tuning": f"{frontend.gflops() + added:.4g}"} if added else {}
    return {} if name is None else {"tuning": f"{name} ({known})" if known else name, **cost}
