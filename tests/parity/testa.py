"""Models of TESTA's reference files."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from parity.cases import Case, assert_close
from torch import Tensor

from tempme_vl import VisualFrontend
from tempme_vl.backbones.divided import once
from tempme_vl.backbones.testa import Kind
from tempme_vl.backbones.testa_checkpoint import TOWER
from tempme_vl.merging import MergeSchedule, make_schedule
from tempme_vl.state import TokenState
from tempme_vl.tasks.testa.model import ContrastOptions
from tempme_vl.tasks.testa.public import load_public, public_names
from tempme_vl.tasks.testa.retrieval import TestaRetrievalModel
from tempme_vl.text import BertDecoder, BlipShape, BlipTextEncoder, decoder_to_umt, load_umt_decoder
from tempme_vl.text.blip import text_from_public, tie


def schedule_of(c: dict[str, Any], frames: int, depth: int, part: dict[str, Any], prune: bool = False) -> MergeSchedule:
    """The schedule of a case: none without r; r holds frames and patches of each block in turn, or patches alone."""
    shape = depth, frames, 1 + (c["img"] // c["patch"]) ** 2
    r = part.get("r")
    if r is None:
        return make_schedule("none", *shape, divided=True)
    patches_alone = part.get("merging_type", "frame&patch") == "patch"
    temporal, spatial = (0, r) if patches_alone else (r[0::2], r[1::2])
    strategy = "prune" if prune else "geometry"
    return make_schedule("testa", *shape, divided=True, temporal_r=temporal, spatial_r=spatial, strategy=strategy)


def tower_of(
    state: dict[str, Tensor], heads: int, image_size: int, schedule: MergeSchedule, attention: Kind = "divided"
) -> VisualFrontend:
    """Of weights with the prefix of the visual encoder or without."""
    if not any(key.startswith(TOWER) for key in state):
        state = {TOWER + key: value for key, value in state.items()}
    return VisualFrontend.from_testa_state_dict(state, heads, image_size, schedule, attention).eval()


def in_reference_order(x: Tensor, clips: int) -> Tensor:
    """(B, 1 + C * L, ...), frame by frame -> place by place, the frames of each."""
    return torch.cat([x[:, :1], rearrange(x[:, 1:], "b (t l) ... -> b (l t) ...", t=clips)], 1)


def tokens_of(state: TokenState) -> Tensor:
    """(B, 1 + L * T, D) of a state, in the order of the references."""
    return in_reference_order(once(state.x, state.num_clips, 1), state.num_clips)


def states_of(frontend: VisualFrontend, video: Tensor) -> tuple[list[TokenState], Any]:
    """The state behind every block, and the output, of videos (B, 3, T, H, W)."""
    states: list[TokenState] = []
    hooks = [block.register_forward_hook(lambda _, __, state: states.append(state)) for block in frontend.blocks]
    output = frontend(video.to(frontend.norm.weight.dtype).transpose(1, 2), trace_source=True)
    for hook in hooks:
        hook.remove()
    return states, output


def text_of(case: Case, heads: int, prefix: str = "w.text_encoder.") -> BlipTextEncoder:
    """In float64, without dropout."""
    return text_from_public(case.group(prefix), heads, dropout=0.0).double().eval()


def decoder_of(
    case: Case, text: BlipShape, cross_width: int | None, tied: BlipTextEncoder | None = None
) -> BertDecoder:
    """In float64; all its weights are those of the file, or of the encoder that it is tied to."""
    layers = max(int(key.split(".")[5]) for key in case.tensors if key.startswith("w.text_decoder.bert.encoder."))
    decoder = BertDecoder(text, layers + 1, cross_width)
    if tied is not None:
        tie(decoder, tied)
    weights = case.group("w.text_decoder.")
    load_umt_decoder(decoder, weights)
    own = decoder_to_umt(decoder)
    for key, value in own.items():
        if tied is None or key in weights:
            assert torch.equal(value.double(), weights[key].double()), key
    return decoder.double().eval()


def retrieval_of(case: Case) -> TestaRetrievalModel:
    """In float64 and training, with the file's momentum copies and queue."""
    j, weights = case.config, case.group("w.")
    c = j["config"]
    schedule = schedule_of(c, c["T"], c["vdepth"], c)
    frontend = tower_of(weights, c["vh"], c["img"], schedule)
    all_ranks = j.get("negative_all_rank", True)
    options = ContrastOptions(c["queue"], c["momentum"], j.get("alpha", 0.0), all_ranks)
    text = text_of(case, c["heads"])
    model = TestaRetrievalModel(frontend, text, words_of(case, text), None, options)
    converted = load_public(model, weights, queues=True)
    assert not converted.missing and not converted.unused
    return model.double().train()


def words_of(case: Case, text: BlipTextEncoder) -> tuple[str, ...]:
    """The vocabulary of the file, or numbers in its place."""
    return tuple(case.config.get("vocab", map(str, range(text.shape.vocab_size))))


def batch_of(case: Case, rows: slice = slice(None)) -> dict[str, Tensor]:
    t = case.tensors
    ids = t["in.idx"][rows] if "in.idx" in t else torch.arange(len(t["in.video"]))[rows]
    return {
        "video": t["in.video"][rows].double().transpose(1, 2),
        "text_ids": t["in.text_ids"][rows],
        "text_mask": t["in.text_mask"][rows],
        "video_id": ids.long(),
        "valid": torch.ones(len(ids)),
    }


def with_drawn(model: Any, features: dict[str, Tensor], batch: dict[str, Tensor], drawn: dict[str, Tensor]) -> Tensor:
    """The matching logits with the recorded negatives."""
    *_, own = model.negatives(features, batch)
    other = drawn["neg_video_for_text"].long(), drawn["neg_text_for_video"].long()
    return model.match(model.among(features, batch, own), *other)


def assert_grads(case: Case, model: torch.nn.Module, tolerance: float = 1e-5) -> None:
    """All gradients of the file, relative to the largest of a tensor; what the file lists as without one has none."""
    names, expected = public_names(model), case.group("grad.")
    found = {names[name]: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    assert expected and expected.keys() <= found.keys()
    for name, grad in expected.items():
        assert_close(found[name].reshape(grad.shape), grad, name, tolerance * max(1, grad.abs().max().item()))
    for name in case.config.get("no_grad", []):
        assert name not in found or not found[name].any()
