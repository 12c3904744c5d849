"""UMT's vision encoder equals the original: joint, single frames, other tables; and TempMe inside it."""

from __future__ import annotations

import pytest
import torch
from parity.cases import assert_close
from parity.umt import UmtCase, umt_cases

from tempme_vl import MergeSchedule, VisualFrontend

VISION, TEMPME = umt_cases("umt_vision_*"), umt_cases("umt_tempme_*")


def frontend(case: UmtCase, mode: str, schedule: MergeSchedule | None = None, **options: object) -> VisualFrontend:
    c = case.config
    schedule = schedule or identity(case)
    return VisualFrontend.from_umt_state_dict(case.group("w."), c["h"], c["img"], mode, schedule, **options).eval()


def identity(case: UmtCase) -> MergeSchedule:
    c = case.config
    return MergeSchedule.identity(c["d"], c["T"], (c["img"] // c["p"]) ** 2, prefix=0)


@pytest.mark.parametrize("case", VISION, ids=str)
@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("joint", "joint", {}),
        ("image", "per_frame", {}),
        ("frames_jointpos", "per_frame", {"positions": "joint"}),
        ("joint_interp", "joint", {"pretrained_frames": "ckptT"}),
    ],
)
@torch.no_grad()
def test_vision(case: UmtCase, name: str, mode: str, options: dict) -> None:
    options = {key: case.config.get(value, value) for key, value in options.items()}
    model, t = frontend(case, mode, **options), case.tensors
    output = model(t["in.video"])
    tokens = model.norm(output.tokens)
    assert_close(tokens.flatten(0, 1), t[f"out.{name}.tokens"].flatten(0, 1), "tokens")
    if mode == "joint":
        assert_close(output.frames, t[f"out.{name}.pool_temporal"], "a frame's tokens pooled")
        if f"out.{name}.pool_all" in t:
            assert_close(model.head(tokens.mean(1, keepdim=True)), t[f"out.{name}.pool_all"], "all tokens pooled")
    elif name == "image":
        assert_close(output.frames.flatten(0, 1), t["out.image.pool"].squeeze(1), "a frame's tokens pooled")


@pytest.mark.parametrize("case", VISION, ids=str)
@torch.no_grad()
def test_position_tables_and_first_block(case: UmtCase) -> None:
    t, c = case.tensors, case.config
    stretched = f"interp_{c['ckptT']}to{c['T']}"
    for name, mode, options in (
        ("joint", "joint", {}),
        ("image", "per_frame", {}),
        (stretched, "joint", {"pretrained_frames": c["ckptT"]}),
    ):
        table = frontend(case, mode, **options).embed.positions
        assert_close(table.flatten(0, 1), t[f"out.pos_{name}"].squeeze(0), f"table {name}")
    model, seen = frontend(case, "joint"), []
    model.blocks[0].register_forward_hook(lambda _, __, state: seen.append(state.x))
    model(t["in.video"])
    assert_close(seen[0], t["out.joint.block0"], "the first block")


@pytest.mark.parametrize("case", TEMPME, ids=str)
@torch.no_grad()
def test_tempme(case: UmtCase) -> None:
    c, t = case.config, case.tensors
    schedule = MergeSchedule.tempme(
        c["d"],
        c["T"],
        (c["img"] // c["p"]) ** 2,
        c["r"],
        tuple(c["layers"]),
        tuple(c["frames"]),
        round(100 * c["RC"]),
        round(100 * c["RI"]),
        prefix=0,
    )
    assert [[i, *count] for i, count in enumerate(schedule.token_counts)] == case.entry["trace_layer_clips_tokens"]
    model = frontend(case, "per_frame", schedule)
    for position, number in zip(model.clip_positions.values(), sorted(case.group("in.clip_pos_")), strict=True):
        position.copy_(t[f"in.clip_pos_{number}"])
    output = model(t["in.video"])
    assert torch.equal(output.size, t["out.size"])
    tokens = model.norm(output.tokens)
    assert_close(tokens, t["out.tokens"], "tokens")
    assert_close(model.head(tokens.mean(1, keepdim=True)), t["out.pool_mean"], "plain mean")
    assert_close(output.frames, t["out.pool_size_weighted"], "mean weighted by size")


@pytest.mark.parametrize("case", VISION, ids=str)
@torch.no_grad()
def test_joint_with_one_frame_is_frames_apart(case: UmtCase) -> None:
    c = case.config
    schedule = MergeSchedule.identity(c["d"], 1, (c["img"] // c["p"]) ** 2, prefix=0)
    video = case.tensors["in.video"][:, :1]
    joint, apart = (frontend(case, mode, schedule)(video) for mode in ("joint", "per_frame"))
    assert torch.equal(joint.tokens, apart.tokens) and torch.equal(joint.pooled, apart.pooled)


@pytest.mark.parametrize("case", VISION, ids=str)
@torch.no_grad()
def test_tempme_that_merges_nothing_is_umt4clip(case: UmtCase) -> None:
    """ImgMe of 0 pairs and no joins: the steps are there and change nothing."""
    c = case.config
    schedule = MergeSchedule.tempme(c["d"], c["T"], (c["img"] // c["p"]) ** 2, 0, (), (), 0, 0, prefix=0)
    merged, plain = (frontend(case, "per_frame", s)(case.tensors["in.video"]) for s in (schedule, None))
    assert torch.equal(merged.tokens, plain.tokens) and torch.equal(merged.pooled, plain.pooled)
