"""Every way of tuning, with and without merging: it starts, trains, is saved and comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tuning import models
from tuning.models import fitting, make, outputs, train, trained

from tempme_vl import VisualFrontend, create_frontend
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.backbones.open_clip_models import build_clip, model_config
from tempme_vl.merging import METHODS, make_schedule
from tempme_vl.pooling import mean_by_clip
from tempme_vl.tasks.heads import find_head
from tempme_vl.tasks.retrieval import RetrievalModel, load_retrieval_model
from tempme_vl.tasks.similarity import PairContext
from tempme_vl.text.clip import CLIPTextEncoder
from tempme_vl.tuning import TUNINGS, Lora, Tuning, find_tuning

# where a small model wants others than the defaults, or these would leave something out
OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"rank": 2},
    "prompt": {"tokens": 2},
    "plevu": {"prefix": 2, "postfix": 1, "heads": 4},
    "vop": {"visual": 2, "prefix": 1, "suffix": 1},
    "dgl": {"tokens": 2},
    "mv_adapter": {"width": 8, "words": 4, "factor": 4},
    "testa_clip": {"rank": 2, "blocks": (0, 1)},
}
STARTS_ELSEWHERE = ("prompt", "plevu", "vop", "dgl", "testa_clip")
each = pytest.mark.parametrize("name", TUNINGS)
merging = pytest.mark.parametrize("method", ["tempme", "none"])


def tuning(name: str) -> Tuning:
    return find_tuning(name, OPTIONS.get(name))


def made(name: str, method: str = "tempme") -> RetrievalModel:
    return models.made(tuning(name), method)


@each
@merging
def test_it_trains_alone_and_is_saved(name: str, method: str, tmp_path: Path) -> None:
    plain = make("CLIP", "full", method)
    start = make("CLIP", tuning(name), method)
    difference = (outputs(start, "CLIP") - outputs(plain, "CLIP")).abs().max()
    assert difference > 1e-4 if name in STARTS_ELSEWHERE else difference < 1e-6

    model = made(name, method)
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    train(model, "CLIP")
    learnt = {key for key, weight in model.named_parameters() if not torch.equal(weight, before[key])}
    assert learnt == trained(model) - unused(model)
    there = {key for key, _ in plain.named_parameters() if not plain.is_new_parameter(key)}
    assert {key for key in trained(model) if not model.is_new_parameter(key)} == there & trained(model)

    model.save_pretrained(tmp_path / "best")
    loaded = load_retrieval_model(tmp_path / "best")
    assert (loaded.state_dict().keys() == plain.state_dict().keys()) == (not model.tuning.stays)
    merged = isinstance(model.tuning, Lora)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if merged else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(outputs(loaded, "CLIP"), outputs(model, "CLIP"), **tolerance)


def unused(model: RetrievalModel) -> set[str]:
    """What cannot learn, by the tuning itself."""
    behind = {f"frontend.tuned.prompts.behind.{part}" for part in ("weight", "bias")}
    return behind if model.tuning.name == "dgl" else set()


@each
def test_recomputing_blocks_changes_nothing(name: str) -> None:
    model, again = made(name), made(name)
    again.set_grad_checkpointing()
    for one in (model, again):
        train(one, "CLIP", 1)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@each
def test_it_works_with_every_method(name: str, tmp_path: Path) -> None:
    """Or the two refuse each other and say what else there is; recomputing blocks changes nothing."""
    for method in METHODS:
        try:
            model, again = made(name, method), made(name, method)
        except ValueError as error:
            assert method != "none" and str(error).startswith(name) and "choose" in str(error)
            continue
        again.set_grad_checkpointing()
        counts: list[tuple[int, int]] = []
        for block in model.frontend.blocks:
            block.register_forward_hook(lambda _, __, state, to=counts: to.append((state.num_clips, state.x.shape[1])))
        outputs(model, "CLIP")
        assert counts == model.frontend.schedule.token_counts
        for one in (model, again):
            train(one, "CLIP", 1)
        state = again.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), method
        model.save_pretrained(tmp_path / method)
        loaded = load_retrieval_model(tmp_path / method)
        assert (outputs(loaded, "CLIP") - outputs(model, "CLIP")).abs().max() < 1e-5, method


@each
def test_half_precision_is_near(name: str) -> None:
    model = made(name, "none")
    full = outputs(model, "CLIP")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = outputs(model, "CLIP")
    half = outputs(model.bfloat16(), "CLIP")
    assert (mixed - full).abs().max() < 0.05 and (half - full).abs().max() < 0.1


@pytest.mark.slow
@merging
@each
def test_it_compiles_without_breaks(name: str, method: str) -> None:
    torch.compiler.reset()
    model, given = made(name, method), fitting(make("CLIP", tuning(name), method), "CLIP")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    losses = []
    for forward in (model, compiled):
        torch.manual_seed(0)
        losses.append(model.loss(forward(given), given))
    gradients = [torch.autograd.grad(loss, learning(model)) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def learning(model: RetrievalModel) -> list[torch.Tensor]:
    return [weight for key, weight in model.named_parameters() if weight.requires_grad and key not in unused(model)]


@pytest.mark.parametrize("name", [name for name, kind in TUNINGS.items() if kind.stays])
def test_what_has_no_place_for_modules_is_refused(name: str, tmp_path: Path) -> None:
    for kind in ("UMT", "QA"):
        with pytest.raises(ValueError, match=f"'{name}' adds modules that cannot be merged .* choose lora or dora"):
            make(kind, tuning(name))
    model = made(name)
    with pytest.raises(ValueError, match="has added modules that cannot be merged into them"):
        model.openai_state_dict()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"modules of the tuning '{name}'"):
        create_frontend("open_clip:tiny", str(tmp_path), method="none", num_frames=4)
    with pytest.raises(ValueError, match=f"modules of the tuning '{name}'"):
        VisualFrontend.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "method", "message"),
    [
        ("prompt", {"tokens": 0}, "none", "expected at least 1 prompt a block"),
        ("adapter", {"width": 0}, "none", "expected a width of at least 1"),
        ("plevu", {"prefix": -1}, "none", "expected prefix and postfix from 0"),
        ("plevu", {"heads": 7}, "none", "expected heads that divide the embedding's 64; got 7"),
        ("plevu", {"prefix": 70, "postfix": 5, "heads": 4}, "none", "75 learnt words leave 2 of 77 places for texts"),
        ("vop", {"visual": 0, "prefix": 0, "suffix": 0}, "none", "expected numbers of prompts from 0, and not only 0"),
        ("dgl", {"prompts": "cubic"}, "none", "'prompts': expected one of 'linear', 'transformer'"),
        ("dgl", {"text_tokens": 3}, "none", "an even number of text_tokens"),
        ("mv_adapter", {"shared": (9,)}, "none", r"numbers of blocks among \[0, 1, 2, 3, 4, 5\]; got \[9\]"),
        ("mv_adapter", {}, "testa", "reads every frame's CLS token, and 'testa' leaves [0-9] of [0-9]"),
        ("testa_clip", {"blocks": (6,)}, "none", "expected numbers of blocks from 0 to 5; got 6"),
        ("testa_clip", {"blocks": (4,)}, "tempme", r"leaves one clip in all of the blocks \[4\]"),
    ],
)
def test_what_is_no_option(name: str, options: dict[str, Any], method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("CLIP", find_tuning(name, options), method)


@pytest.mark.parametrize("method", ["centerclip", "testa"])  # segments, and frames that a video chooses
def test_frames_attend_to_each_other_where_merging_left_fewer(method: str) -> None:
    model = made("plevu", method)
    last = model.frontend.schedule.layer_counts[-1]
    assert last.clips * last.prefix < model.frontend.schedule.frames
    train(model, "CLIP", 1)
    assert outputs(model, "CLIP").isfinite().all()


def test_a_value_of_merged_frames_is_their_mean() -> None:
    of_frames = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    assert torch.equal(mean_by_clip(of_frames, 4), of_frames)
    assert mean_by_clip(of_frames, 2).flatten().tolist() == [2, 15]
    held = mean_by_clip(of_frames, 2, torch.tensor([[0, 1, 0, -1], [1, 1, 0, 1]]))
    assert held.flatten(1).tolist() == [[5.5, 3], [10, 8]]


def test_more_words_than_a_model_was_tuned_for() -> None:
    with pytest.raises(ValueError, match="tuned for 3 words at most; got 4: give max_words"):
        outputs(make("CLIP", find_tuning("mv_adapter", {"words": 3})), "CLIP")


COUNTS = [  # trainable parameters of CLIP's ViT-B/32 and of B/16, in the tables of the papers
    ("full", {}, 151_277_313, None),
    ("clip4clip", {}, 123_540_993, 123_540_993),
    ("lora", {}, 491_520, 491_520),
    ("prompt", {}, 76_800, 76_800),
    ("adapter", {}, 261_312, 261_312),
    ("plevu", {}, 6_350_336, 6_350_336),
    ("vop", {}, 122_880, 122_880),
    ("dgl", {}, 827_392, 827_392),
    ("dgl", {"prompts": "transformer"}, 9_575_168, 9_575_168),
    ("mv_adapter", {}, 3_496_704, 3_496_704),
    ("testa_clip", {}, 589_824, 589_824),
    ("vop", {"visual": 4, "prefix": 4, "suffix": 0}, 61_440, 61_440),
]


@pytest.mark.parametrize(("name", "options", "b32", "b16"), COUNTS, ids=lambda value: str(value))
def test_what_trains_is_counted_as_in_the_papers(name: str, options: dict[str, Any], b32: int, b16: int | None) -> None:
    for tower, tokens, count in (("ViT-B-32-quickgelu", 50, b32), ("ViT-B-16-quickgelu", 197, b16)):
        if count is not None:
            assert trainable(name, options, tower, tokens, "none") == count
            assert trainable(name, options, tower, tokens, "tempme") == count + 21 * 768  # clip positions


@pytest.mark.parametrize(
    ("tuning", "head", "count"),
    [
        ("clip4clip", "seqlstm", 125_681_665),
        ("clip4clip", "seqtransf", 136_189_953),
        ("clip4clip", "tighttransf", 136_454_146),
        ("clip4clip", "eercf", 136_452_241),
        ("full", "xpool", 152_593_665),
    ],
)
def test_what_trains_with_a_head_is_counted_as_in_the_papers(tuning: str, head: str, count: int) -> None:
    assert trainable(tuning, {}, "ViT-B-32-quickgelu", 50, "none", head) == count


def trainable(name: str, options: dict[str, Any], tower: str, tokens: int, method: str, head: str = "mean") -> int:
    kind: Any = find_head(head, "retrieval")
    with torch.device("meta"):
        clip = build_clip(model_config(tower))
        frontend = VisualFrontend(visual_backbone(clip.visual), make_schedule(method, 12, 12, tokens))
        text = CLIPTextEncoder(clip)
        model = RetrievalModel(frontend, text, {}, head=kind.create(PairContext(frontend, text), kind.options()))
        model.tune(find_tuning(name, options))
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
