"""What a rank does in the test of TESTA on several ranks. Each function runs in processes of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from training.models import train_config

from tempme_vl.tasks.losses import matching_loss
from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.tasks.qa.model import VideoQAModel
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.tasks.testa import TestaRetrievalModel, retrieval
from tempme_vl.tasks.testa.contrast import Sides, contrast, positives
from tempme_vl.text.tokenizers import word_vocabulary
from tempme_vl.training import distributed
from tempme_vl.training.engine import TrainConfig, Trainer
from tempme_vl.training.optim import parameter_groups

BATCH, FRAMES, STEPS = 8, 4, 4
ANSWERS = ("word7", "word12 word5", "word3")
MERGING: dict[str, Any] = {"method": "testa", "num_frames": FRAMES, "r_temporal": 0, "r_spatial": 1}
WORDS = word_vocabulary([f"word{number}" for number in range(16)])


class Samples(Dataset):
    """Random videos; every fifth sample shares its video with the one before it."""

    def __len__(self) -> int:
        return 2 * BATCH

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index = key[1]
        video_id = index - 1 if index % 5 == 4 else index
        video = torch.randn(FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(video_id))
        return {"video": video, "frame_mask": torch.ones(FRAMES), "video_id": video_id, "valid": 1} | {
            "name": f"sample-{index}"
        }


class Pairs(Samples):
    """With two words each."""

    def __init__(self, model: TestaRetrievalModel):
        self.tokenize = model.words.tokenizer(6)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        ids, mask = self.tokenize(f"word{key[1]} word{key[1] % 3}")
        return {**super().__getitem__(key), "text_ids": ids, "text_mask": mask, "text_id": key[1]}


class Asked(Samples):
    """With a question and one of three answers each."""

    def __init__(self, model: VideoQAModel):
        self.tokenize = model.tokenize

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        asked = self.tokenize(f"word{key[1]} word9", ANSWERS[key[1] % 3])
        return {**super().__getitem__(key), **asked, "answer_weight": torch.tensor(1.0)}


def trainer_of(output: Path, stage: str, batch_size: int = BATCH, precision: str = "fp32") -> Trainer:
    """TESTA's tiny model with a queue of three steps, its negatives the most similar ones and not drawn."""
    distributed.initialize()
    retrieval.draw_negatives = lambda weights, generator=None, own=None: weights.argmax(1)
    torch.manual_seed(0)
    model = create_retrieval_model("testa:tiny", vocabulary=WORDS, queue=3 * BATCH, momentum=0.8, **MERGING)
    assert isinstance(model, TestaRetrievalModel)
    return _trainer(model, Pairs(model), train_config(output, stage, batch_size=batch_size, precision=precision))


def _trainer(model: TestaRetrievalModel | VideoQAModel, dataset: Dataset, config: TrainConfig) -> Trainer:
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-2, 1e-2, 0.0, model.is_new_parameter))
    return Trainer(model, optimizer, dataset, config)


def answer_stages(stages: tuple[str, ...], output: Path) -> dict[str, list[float]]:
    """Stage -> losses of `STEPS` steps of question answering."""
    distributed.initialize()
    found = {}
    for stage in stages:
        torch.manual_seed(0)
        model = create_qa_model("testa:tiny", WORDS, "decoder", ANSWERS, **MERGING)
        trainer = _trainer(model, Asked(model), train_config(output / stage, stage, batch_size=BATCH))
        found[stage] = _steps(trainer, model.loss)
        trainer.engine.destroy()
    return found


def _steps(trainer: Trainer, loss: Any) -> list[float]:
    losses = []
    for batch in trainer.batches():
        losses.append(trainer.update(batch, loss))
        if trainer.step == STEPS:
            break
    return losses


def train_stages(stages: tuple[str, ...], output: Path) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Stage -> (losses, all weights, copies and queue) after `STEPS` steps on these ranks."""
    return {stage: train(trainer_of(output / stage, stage)) for stage in stages}


def train(trainer: Trainer) -> tuple[list[float], dict[str, Tensor]]:
    model = trainer.engine.module
    losses = _steps(trainer, model.loss if distributed.world_size() == 2 else as_two_ranks(model))
    weights = {name: weight.clone() for name, weight in trainer.full_state_dict().items()}
    trainer.engine.destroy()
    return losses, weights


def as_two_ranks(model: TestaRetrievalModel) -> Any:
    """The loss of one rank with all pairs, but that each half of them has columns of contrast of its own."""

    def loss(features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
            online = Sides(features["video"][half], features["text"][half])
            copies = Sides(features["momentum_video"][half], features["momentum_text"][half])
            labels = positives(batch["video_id"][half], model.queue.ids[0])
            parts.append(contrast(online, copies, model.queue, features["temperature"], labels, model.distill).loss())
        model.enqueue(features, batch)
        return sum(parts) / 2 + matching_loss(features["match"], features["match_valid"])

    return loss


def refusal(output: Path, changes: Mapping[str, Any]) -> str:
    """What is said of a training that cannot be."""
    try:
        trainer_of(output, **changes)
    except ValueError as error:
        return str(error)
    return "none"
