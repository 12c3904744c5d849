"""A tiny random Llama with a sentencepiece tokenizer trained on the spot, and questions about videos to learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import sentencepiece
import torch
from torch import Tensor
from towers import random_video
from training.models import RECIPES
from transformers import LlamaConfig, LlamaForCausalLM

from tempme_vl.tasks.qa import VideoQAModel, create_qa_model, load_qa_model
from tempme_vl.training import distributed
from tempme_vl.training.checkpoint import full_state_dict
from tempme_vl.training.engine import TrainConfig, deepspeed_config

FRAMES, VIDEOS = 6, 10
THINGS = ("ball", "dog", "man on the left", "red car", "second box")
DOINGS = ("rolling", "eating", "jumping up", "standing", "fast asleep", "far away", "red", "playing the piano")
QUESTIONS = tuple(f"What is the {thing} doing?" for thing in THINGS) * VIDEOS
OF_VIDEO = torch.arange(VIDEOS).repeat_interleave(len(THINGS))
# neither the video nor the question tells the answer by itself
ANSWERS = tuple(
    DOINGS[number] for number in torch.randint(8, (50,), generator=torch.Generator().manual_seed(0)).tolist()
)
TOWER: dict[str, Any] = {"r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3)}
TOWER |= {"cross_percent": 40, "intra_percent": 20}


def write_llm(folder: Path, tied: bool = False, **shape: Any) -> Path:
    """A folder as language models are published: config, safetensors weights, and the tokenizer.model of Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"Question: {question} Short answer: {doing}" for question in QUESTIONS[:5] for doing in DOINGS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,  # this and the next two as Llama has them
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    words = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**{"vocab_size": words, "tie_word_embeddings": tied, **sizes, **heads, **shape}))
    llm.generation_config.repetition_penalty = 5.0  # some published models have one
    llm.save_pretrained(folder)
    return folder


def tiny_llm_qa(folder: Path, method: str = "tempme", seed: int = 0, **options: Any) -> VideoQAModel:
    """The tiny CLIP tower, its clip positions random, in front of the language model of a folder."""
    torch.manual_seed(seed)
    tower = {"tempme": TOWER, "tome": {"r": 2}, "none": {}}[method]
    options = {"num_frames": FRAMES, "clip_position_std": 0.1, "max_words": 24, **tower, **options}
    return create_qa_model("open_clip:tiny", head="llm", llm=str(folder), method=method, **options)


def videos() -> Tensor:
    """(VIDEOS, F, 3, 32, 32), each with its own changes of colour."""
    colour = torch.randn(VIDEOS, FRAMES, 3, 1, 1, generator=torch.Generator().manual_seed(3))
    return 0.5 * random_video(FRAMES, videos=VIDEOS) + colour


def asked(
    model: VideoQAModel,
    numbers: Sequence[int],
    trained: bool = False,
    options: Sequence[str] = (),
) -> dict[str, Tensor]:
    """What the head needs to be asked some of QUESTIONS, or to be trained on them."""
    rows = [model.head.tokenize(QUESTIONS[i], ANSWERS[i] if trained else None, options) for i in numbers]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@torch.no_grad()
def encoded(model: VideoQAModel) -> dict[str, Tensor]:
    """Tokens and sizes of the video of each of QUESTIONS."""
    features = model({"video": videos(), "frame_mask": torch.ones(VIDEOS, FRAMES)})
    return {name: features[name][OF_VIDEO] for name in model.kept}


def learn(model: VideoQAModel, steps: int = 140, lr: float = 4e-3) -> None:
    """Trains the head's weights that are not frozen on QUESTIONS, those about 5 of the videos a step."""
    batch = asked(model, range(50), trained=True)
    with torch.no_grad():
        features = model.eval()({"video": videos(), "frame_mask": torch.ones(VIDEOS, FRAMES)})
    optimizer = torch.optim.AdamW([p for p in model.head.parameters() if p.requires_grad], weight_decay=0.0)
    rng = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        chosen = torch.randperm(VIDEOS, generator=rng)[:5]
        rows = (5 * chosen[:, None] + torch.arange(5)).flatten()
        kept = {name: features[name][chosen].repeat_interleave(5, dim=0) for name in model.kept}
        output = model(kept | {key: value[rows] for key, value in batch.items()})
        loss = model.loss(output, {"valid": torch.ones(25)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def answer_and_train_partitioned(folder: Path, output: Path, shares: list[list[int]]) -> dict[str, Any]:
    """Under ZeRO-3, a rank's answers to its share of QUESTIONS, the loss of one update on equal shares, an export."""
    distributed.initialize()
    model = load_qa_model(folder)
    config = TrainConfig(output, RECIPES / "ds" / "zero3.json", 1, 4, precision="fp32")
    settings = deepspeed_config(config, 2, torch.device("cpu"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # even the smallest weights are spread
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    mine = shares[distributed.rank()]
    video = {"video": videos()[OF_VIDEO], "frame_mask": torch.ones(50, FRAMES)}
    engine.eval()
    with torch.no_grad():
        written = engine({key: value[mine] for key, value in video.items()} | asked(model, mine))["prediction"]
    engine.train()
    half = [2 * distributed.rank(), 2 * distributed.rank() + 1]
    batch = {key: value[half] for key, value in video.items()} | asked(model, half, trained=True)
    loss = model.loss(engine(batch), {"valid": torch.ones(2)})
    engine.backward(loss)
    engine.step()
    state = full_state_dict(engine)
    if distributed.is_main():
        model.save_pretrained(output / "export", state)
    return {"texts": [model.head.text(row) for row in written.tolist()], "loss": loss.detach()}
