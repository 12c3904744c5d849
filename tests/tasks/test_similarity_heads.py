"""Heads that compare tokens: gradients, folders, ranks, evaluation; see tests/parity/test_similarity.py, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from towers import TINY, random_video
from training.processes import run

from tempme_vl.backbones.open_clip_models import TINY_CONFIGS
from tempme_vl.evaluation.metrics import retrieval_metrics
from tempme_vl.evaluation.rerank import REST, rerank_by_head, rerank_embeddings, reranked_report, second_stage
from tempme_vl.evaluation.retrieval import embed, retrieval_report
from tempme_vl.tasks.losses import contrastive_loss_of, sigmoid_loss
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model, load_retrieval_model
from tempme_vl.training import distributed
from tempme_vl.training.caching import cached_update

MERGING: dict[str, Any] = {"r": 1, "merge_layers": (2, 3), "merge_frames": (2, 2)}
MERGING |= {"cross_percent": 30, "intra_percent": 10, "clip_position_std": 0.5}
HEADS: dict[str, dict[str, Any]] = {
    "tokens": {"head": "xpool"},
    "frames": {"head": "xpool", "of": "frames", "heads": 2, "dropout": 0.0},
    "words": {"head": "maxsim"},
    "sigmoid": {"head": "maxsim", "loss": "sigmoid", "mean": False},
    "lstm": {"head": "seqlstm"},
    "temporal": {"head": "seqtransf"},
    "temporal tokens": {"head": "seqtransf", "of": "tokens", "layers": 1},
    "tight": {"head": "tighttransf", "layers": 2},
    "tight tokens": {"head": "tighttransf", "of": "tokens", "layers": 1},
    "two stages": {"head": "eercf", "layers": 1, "strong_patch": 0.2, "pearson_patch": 1.0},
}
LIKE_OTHERS = ("temporal tokens", "tight")  # but for an option
each = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in LIKE_OTHERS else kind for kind in HEADS]
)
IDS = [[49406, 320, 525, 49407, 0], [49406, 786, 49407, 0, 0], [49406, 2, 3, 4, 49407], [49406, 9, 49407, 0, 0]]


def tiny(kind: str) -> RetrievalModel:
    torch.manual_seed(0)
    model = create_retrieval_model(TINY, None, "tempme", 4, **MERGING, **HEADS[kind])
    assert isinstance(model, RetrievalModel)
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def batch_of(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Four pairs with texts of different lengths; the third video could not be read."""
    ids = torch.tensor(IDS)
    return {
        "video": random_video(4, 32, videos=4, dtype=dtype),
        "frame_mask": torch.ones(4, 4),
        "text_ids": ids,
        "text_mask": (ids > 0).long(),
        "video_id": torch.arange(4),
        "text_id": torch.arange(4),
        "valid": torch.tensor([1.0, 1.0, 0.0, 1.0]),
    }


@each
def test_the_loss_reads_what_evaluation_ranks_by_and_all_of_the_head_learns(kind: str) -> None:
    model, batch = tiny(kind).eval(), batch_of()
    features, valid = model(batch), batch["valid"].bool()
    assert ("loss" in features) == model.head.learns == (kind != "words")
    found = {**batch, **features}
    scale = 1.0 if "tight" in kind else features["scale"]
    logits = scale * model.head.similarity(found, found)
    loss = model.loss(features, batch)
    if kind == "sigmoid":
        torch.testing.assert_close(loss, sigmoid_loss(logits + model.head.bias, valid=valid))
    elif kind != "two stages":  # whose loss has more parts: tests/parity/test_heads.py
        torch.testing.assert_close(loss, contrastive_loss_of(logits, valid=valid))
    model.loss(features, batch).backward()
    new = {name for name, _ in model.named_parameters() if model.is_new_parameter(name)}
    of_head = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert of_head <= new and all(".clip_position." in name for name in new - of_head)
    none = {"lstm": ["frame_position_embeddings"], "tight": ["log_scale"], "tight tokens": ["log_scale"]}
    for name, weight in model.named_parameters():
        if any(part in name for part in none.get(kind, [])):
            assert weight.grad is None, name
        elif not name.endswith(("k_proj.bias", "similarity_dense.bias")):  # which softmax hides
            assert weight.grad is not None and weight.grad.abs().max() > 0, name
    # padding of a text has no part in it
    longer = {**batch, "text_ids": F.pad(batch["text_ids"], (0, 2), value=7)}
    longer["text_mask"] = F.pad(batch["text_mask"], (0, 2))
    torch.testing.assert_close(model.loss(model(longer), longer), loss)


@each
def test_folders_and_a_second_stage(kind: str, tmp_path: Path) -> None:
    model, batch = tiny(kind).eval(), batch_of()
    model.save_pretrained(tmp_path / "saved")
    again = load_retrieval_model(tmp_path / "saved").eval()
    assert isinstance(again, RetrievalModel) and again.head.told == model.head.told
    expected, found = model(batch), again(batch)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    second = create_retrieval_model(TINY, str(tmp_path / "saved"), "tempme", 4, **MERGING, **HEADS[kind])
    assert all(torch.equal(second.state_dict()[name], value) for name, value in model.state_dict().items())
    # from one head to another: the towers go on, the head starts anew
    other = create_retrieval_model(TINY, str(tmp_path / "saved"), "tempme", 4, **MERGING)
    assert not any(name.startswith("head.") for name in other.state_dict())
    other.save_pretrained(tmp_path / "mean")
    back = create_retrieval_model(TINY, str(tmp_path / "mean"), "tempme", 4, **MERGING, **HEADS[kind])
    weight = "text.embed.positional_embedding"
    assert torch.equal(back.state_dict()[weight], model.state_dict()[weight])


class Rows(Dataset):
    def __init__(self, **columns: Tensor):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def evaluated(kind: str) -> tuple[Tensor, dict[str, Any]]:
    """Scores of 4 texts and 3 videos, the first two texts about the first; the last video could not be read."""
    model, batch = tiny(kind).eval(), batch_of()
    videos = Rows(video=batch["video"][:3], frame_mask=batch["frame_mask"][:3], valid=torch.tensor([1, 1, 0]))
    captions = Rows(text_ids=batch["text_ids"], text_mask=batch["text_mask"])
    stage, cpu = second_stage(model), torch.device("cpu")
    found = embed(model, videos, captions, [0, 0, 1, 2], cpu, 2, 0, stage, model.head)
    again = {} if stage is None else {"reranked": rerank_embeddings(stage, found, cpu, 1)}
    return found.of_texts(0, 4), {**retrieval_report(found), **again}


def gradient(kind: str) -> dict[str, Tensor]:
    """The loss and its gradient, averaged over ranks as DeepSpeed averages them, in float64."""
    model, batch = tiny(kind).double().eval(), batch_of(torch.float64)
    local = 4 // distributed.world_size()
    mine = slice(distributed.rank() * local, (distributed.rank() + 1) * local)
    batch = {name: value[mine] for name, value in batch.items()}
    loss = model.loss(model(batch), batch)
    loss.backward()
    result = {"loss": loss.detach()}
    result |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if distributed.world_size() > 1:
        for value in result.values():
            dist.all_reduce(value)
    return {name: value / distributed.world_size() for name, value in result.items()}


def on_a_rank(kind: str) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    distributed.initialize()
    return *evaluated(kind), gradient(kind)


@pytest.mark.parametrize("kind", ["tokens", *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*HEADS][1:])])
def test_two_ranks_have_the_loss_the_gradient_and_the_scores_of_one(kind: str) -> None:
    ((scores, report, whole),) = run(on_a_rank, kind)
    assert scores.shape == (4, 3) and scores.unique().numel() == 12
    for other, other_report, part in run(on_a_rank, kind, world=2):
        torch.testing.assert_close(other, scores)
        assert other_report == report
        assert part.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_scores_of_an_evaluation_are_those_of_all_pairs_at_once() -> None:
    model, batch = tiny("words").eval(), batch_of()
    scores, report = evaluated("words")
    with torch.no_grad():
        found = {**batch, **model(batch)}
        expected = model.head.similarity(found, {"video": found["video"][:3]})
    torch.testing.assert_close(scores, expected)
    assert (report["unreadable_videos"], report["videos"], report["captions"]) == (1, 3, 4)
    assert {"t2v", "v2t_any_caption", "v2t_max_pooled"} < report.keys()


@torch.no_grad()
def test_a_second_stage_ranks_candidates_of_its_own_in_both_directions() -> None:
    model, batch = tiny("two stages").eval(), batch_of()
    head, f, valid = model.head, {**batch, **model(batch)}, batch["valid"].bool()
    first, fine = head.similarity(f, f), head.fine(f, f)
    text = {name: f[name] for name in (*head.text_parts, *head.fine_text_parts)}
    video = {name: f[name] for name in (*head.video_parts, *head.fine_video_parts)}
    options: dict[str, Any] = {"device": torch.device("cpu"), "top_k": 1, "pairs_per_batch": 3, "progress": False}
    found = rerank_by_head(head, text, video, first, valid, **options)
    assert head.candidates == 50 and found.keeps_rest
    read = first.masked_fill(~valid, -torch.inf)
    own_video, own_text = read.argmax(1), read.argmax(0)
    rows = torch.arange(4)
    t2v, v2t = read.clone(), first.T.clone()
    t2v[rows, own_video] = 100 + fine[rows, own_video]
    v2t[rows, own_text] = 100 + fine[own_text, rows]
    torch.testing.assert_close(found.t2v, t2v)
    torch.testing.assert_close(found.v2t[valid], v2t[valid])
    assert (found.v2t[~valid] == REST).all()
    assert not torch.equal(found.v2t[valid] > 50, found.t2v.T[valid] > 50), "candidates of videos are those of texts"
    report = reranked_report(found, range(4))
    theirs = retrieval_metrics(found.t2v.T, torch.arange(4), ~valid)
    assert report["v2t_transposed"] == theirs and report["rerank_top_k"] == 1


class Engine:
    """As `cached_update` uses one of DeepSpeed, which averages over the chunks."""

    def __init__(self, model: RetrievalModel, chunks: int):
        self.model, self.chunks = model, chunks

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model(batch)

    def backward(self, loss: Tensor) -> None:
        (loss / self.chunks).backward()

    def step(self) -> None:
        pass


def test_words_and_tokens_in_chunks_give_the_gradient_of_the_whole_batch() -> None:
    whole, parts, batch = tiny("words").eval(), tiny("words").eval(), batch_of()
    whole.loss(whole(batch), batch).backward()
    cached_update(Engine(parts, 2), batch, parts.loss, 2, lambda loss: None)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("head", ["seqlstm", "seqtransf", "tighttransf", "eercf"])
def test_heads_that_start_as_the_text_tower_need_its_width(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY_CONFIGS, "narrow", {**TINY_CONFIGS["tiny"], "embed_dim": 32})
    with pytest.raises(ValueError, match=r"as wide as the embedding.*: 32; got CLIPTextEncoder of 64: choose another"):
        create_retrieval_model("open_clip:narrow", None, "none", 4, head=head)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "decoder"}, "'decoder' is for another task, and is no head for retrieval; expected one of mean"),
        ({"head": "xpool", "heads": 7}, "expected a number of heads that divides the width"),
        ({"head": "xpool", "dropout": 2}, "head 'xpool', 'dropout': expected a number from 0 to 1"),
        ({"head": "seqtransf", "layers": 0}, "head 'seqtransf', 'layers': expected a whole number from 1"),
        ({"head": "maxsim", "of": "pixels"}, "head 'maxsim', 'of': expected one of 'tokens', 'frames'"),
        ({"name": "umt:tiny", "head": "xpool", "vocabulary": ("[PAD]",)}, "leave the head 'mean'"),
    ],
)
def test_heads_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_retrieval_model(**{"name": TINY, "num_frames": 4, **MERGING, **given})
