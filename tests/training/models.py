"""Small models of every task with made-up data to train them on, and a linear model for what needs no encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.backbones.open_clip_models import build_clip
from tempme_vl.frontend import VisualFrontend
from tempme_vl.merging import make_schedule
from tempme_vl.tasks.qa import ClassifierHead, DecoderHead, VideoQAModel
from tempme_vl.tasks.qa.question import QuestionEncoder
from tempme_vl.tasks.retrieval import RetrievalModel
from tempme_vl.text import BertDecoder, BertShape
from tempme_vl.text.clip import CLIPTextEncoder
from tempme_vl.training import distributed
from tempme_vl.training.engine import TrainConfig, Trainer
from tempme_vl.training.optim import parameter_groups
from tempme_vl.tuning import Lora

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FRAMES, SIZE, WORDS, VOCABULARY = 4, 16, 6, 40
ANSWERS = ("word7", "word20 word5", "word30")

SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": WORDS, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1},
}


def small_model(task: str = "retrieval") -> RetrievalModel | VideoQAModel:
    """TempMe with two joins on 17 tokens a frame, its clip positions away from zero; retrieval, whole or by LoRA, or a
    head of QA."""
    torch.manual_seed(0)
    clip = build_clip(SMALL_CLIP)
    options = {"r": 1, "merge_layers": (1, 2), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10}
    frontend = VisualFrontend(
        visual_backbone(clip.visual), make_schedule("tempme", 3, FRAMES, 17, **options), {"family": "x"}
    )
    frontend.init_clip_positions(0.5)
    if task in ("retrieval", "lora"):
        model = RetrievalModel(frontend, CLIPTextEncoder(clip), {"text_cfg": SMALL_CLIP["text_cfg"]})
        if task == "lora":
            model.tune(Lora(rank=2))
        return model
    shape = BertShape.named("tiny", width=32, mlp_width=64, cross_width=32, vocab_size=VOCABULARY)
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(4, VOCABULARY)))
    questions = QuestionEncoder.of_shape(shape, words)
    if task == "classifier":
        return VideoQAModel(frontend, ClassifierHead(questions, ANSWERS))
    return VideoQAModel(frontend, DecoderHead(questions, BertDecoder(shape, 1), ANSWERS))


class Pairs(Dataset):
    """Random pairs; every fifth pair shares its video or its caption with another, number 3 could not be read."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        video_id, text_id = (index - 1 if index % 5 == 4 else index), (index - 1 if index % 5 == 2 else index)
        words = 3 + text_id % 3
        ids = torch.zeros(WORDS, dtype=torch.int64)
        ids[:words] = torch.randint(VOCABULARY, (words,), generator=torch.Generator().manual_seed(text_id))
        mask = torch.ones(FRAMES)
        mask[FRAMES - index % 2 :] = 0
        return {
            "video": torch.randn(
                FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(100 * epoch + video_id)
            ),
            "frame_mask": mask,
            "text_ids": ids,
            "text_mask": (torch.arange(WORDS) < words).long(),
            "video_id": video_id,
            "text_id": text_id,
            "valid": int(index != 3),
            "name": f"pair-{index}",
        }


class Asked(Dataset):
    """A random question about each video of `Pairs`; every fifth answer has no weight, number 3 is unreadable."""

    def __init__(self, model: VideoQAModel):
        self.tokenize, self.pairs = model.tokenize, Pairs()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        pair, index = self.pairs[key], key[1]
        answer = ANSWERS[index % len(ANSWERS)]
        asked = self.tokenize(f"word{4 + index} word{5 + index % 3}" + " word9" * (index % 2), answer)
        shared = {name: pair[name] for name in ("video", "frame_mask", "valid")}
        return {**shared, **asked, "answer_weight": torch.tensor(float(index % 5 != 4)), "name": f"question-{index}"}


def train_config(output: Path, stage: str = "zero0", **changes: Any) -> TrainConfig:
    """The configuration that the recipes' file of this name gives.

    "partitioned" is zero3 with every parameter in parts, and whole only while its module runs: without it, parameters
    as small as these stay whole.
    """
    file = RECIPES / "ds" / f"{stage}.json"
    if stage == "partitioned":
        settings = json.loads((RECIPES / "ds" / "zero3.json").read_text())
        bounds = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        settings["zero_optimization"] |= {f"stage3_{bound}": 0 for bound in bounds}
        output.mkdir(parents=True, exist_ok=True)
        file = output / f"rank{distributed.rank()}.json"
        file.write_text(json.dumps(settings))
    defaults = {"epochs": 3, "batch_size": 8, "workers": 0, "resume": "never"}
    return TrainConfig(output=output, deepspeed_config=file, **{**defaults, **changes})


def small_trainer(output: Path, stage: str, optimizer: str, task: str = "retrieval", **changes: Any) -> Trainer:
    """A recipe's path on its small model: parameter groups, engine, sampler."""
    distributed.initialize()
    model = small_model(task)
    asked = isinstance(model, VideoQAModel)
    groups = parameter_groups(model, 1e-2, 3e-2, 0.1, model.is_new_parameter)
    made = torch.optim.SGD(groups) if optimizer == "sgd" else torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    return Trainer(model, made, Asked(model) if asked else Pairs(), train_config(output, stage, **changes))


class Numbers(Dataset):
    """One number a sample: its own index."""

    def __init__(self, count: int = 12):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"x": torch.tensor([float(key[1])]), "name": f"number-{key[1]}"}


class Line(nn.Module):
    """y = w x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"y": self.w * batch["x"] + self.b}


def line_trainer(output: Path, stage: str = "zero0", **changes: Any) -> Trainer:
    distributed.initialize()
    model = Line()
    return Trainer(
        model, torch.optim.AdamW(model.parameters(), lr=0.1), Numbers(), train_config(output, stage, **changes)
    )
