"""The small ViTs of the reference files: timm's, with the weights of a file, in a front end of one frame."""

from __future__ import annotations

from typing import Any

from parity.cases import Case
from timm.models import VisionTransformer
from torch import Tensor, nn

from tempme_vl import VisualFrontend, make_schedule
from tempme_vl.backbones.timm import backbone_of
from tempme_vl.state import TokenState


def vit_of(case: Case) -> VisionTransformer:
    arch = case.config["arch"]
    vit = VisionTransformer(
        arch["img"],
        arch["patch"],
        num_classes=arch["num_classes"],
        global_pool=arch.get("pool", "token"),
        embed_dim=arch["dim"],
        depth=arch["depth"],
        num_heads=arch["heads"],
        mlp_ratio=arch["mlp_ratio"],
    )
    vit.load_state_dict(case.group("w."))
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = arch.get("ln_eps", 1e-6)
    return vit.eval()


def frontend_of(vit: VisionTransformer, method: str, **options: Any) -> VisualFrontend:
    backbone, _ = backbone_of(vit)
    shape = backbone.shape
    schedule = make_schedule(method, len(backbone.blocks), 1, shape.tokens, shape.num_prefix, **options)
    return VisualFrontend(backbone, schedule)


def states_of(frontend: VisualFrontend, images: Tensor) -> tuple[list[TokenState], Any]:
    """The state behind every block, and the output, of images as videos of one frame."""
    states: list[TokenState] = []
    hooks = [block.register_forward_hook(lambda _, __, state: states.append(state)) for block in frontend.blocks]
    output = frontend(images.unsqueeze(1), trace_source=True)
    for hook in hooks:
        hook.remove()
    return states, output


def holders(source: Tensor, tokens: int) -> Tensor:
    """(R, S) the token that holds each input, -1 for none -> (R, tokens, S) 0 or 1, as the references write it."""
    return nn.functional.one_hot(source + 1, tokens + 1)[..., 1:].transpose(1, 2)
