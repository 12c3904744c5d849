"""A method inside a host's language model (`tempme_vl.compressors.inner`): hooks on its layers while it runs.

What the hooks do is `tempme_vl.integrations.layer_run`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from tempme_vl.compressors.inner import Inner
from tempme_vl.integrations.base import Host
from tempme_vl.integrations.costs import decoder_layers
from tempme_vl.integrations.layer_cache import LayerCache
from tempme_vl.integrations.layer_run import LayerRun, Prompt

PLACES = "visual_places"  # of what `Compressed.prepare` gives
# children of layers whose attention and MLP are told apart; those of `_AFTER` norm what comes out of either
_HALVES = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_AFTER = {"post_self_attn_layernorm", "post_mlp_layernorm"}


class InsideLayers:
    """A method inside the language model of a host.

    Attributes:
        counts: tokens that each layer's attention read of each prompt that ran last, (B, layers).

    Raises:
        ValueError: a language model with too few layers, or with layers that cannot be given fewer tokens.
    """

    def __init__(self, host: Host, layers: Sequence[nn.Module], inner: Inner):
        self.host, self.layers, self.inner = host, layers, inner
        self.counts: list[list[int]] = []
        check_layers(host, layers, inner)
        parameters = inspect.signature(type(host.target).forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    @classmethod
    def of(cls, host: Host) -> InsideLayers | None:
        """None where the host's method does nothing there."""
        if host.inner is None:
            return None
        layers = list(decoder_layers(host))
        inner = host.inner(len(layers))
        return None if inner is None else cls(host, layers, inner)

    @contextmanager
    def running(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Hooks, and what the model is to be given in the place of its inputs.

        Raises:
            ValueError: inputs without the places of visual tokens, or another cache.
        """
        given = dict(inputs)
        places = given.pop(PLACES, None)
        caches = [given.pop(name) for name in ("past_key_values", "cache") if given.get(name) is not None]
        cache = caches[0] if caches else LayerCache()
        if not isinstance(cache, LayerCache):
            raise ValueError(
                f"method {self.host.method!r} works between layers, which then hold different tokens: expected the "
                f"cache of an answer of this compressed model, or none; got a {type(cache).__name__}"
            )
        if places is None and not cache.length:
            raise ValueError(
                f"expected {PLACES!r} among the inputs, as `prepare` gives it; got {', '.join(map(str, given))}"
            )
        if self.host.target.training and getattr(self.host.target, "is_gradient_checkpointing", False):
            raise ValueError(
                f"gradient checkpointing runs layers twice, and method {self.host.method!r} makes tokens fewer between "
                "them: expected a model without it"
            )
        given.pop("use_cache", None)  # the keys are read in any case
        prompt = None if places is None else Prompt(places, given.get("attention_mask"))
        run, handles = LayerRun(self.host.method, self.layers, self.inner, prompt, cache), []
        try:
            for handle in run.hooks():
                handles.append(handle)
            yield {**given, self.cache_name: cache}
        finally:
            for handle in handles:
                handle.remove()
        if run.counts:
            self.counts = run.counts

    def check_generation(self, inputs: Mapping[str, Any]) -> None:
        """Raises:
        ValueError: an answer without a cache.
        """
        config = inputs.get("generation_config") or self.host.target.generation_config
        if inputs.get("use_cache", config.use_cache) is False:
            raise ValueError(
                f"method {self.host.method!r} makes the tokens of a prompt fewer once, and without a cache it would "
                "for each new word: expected use_cache=True"
            )

    def tokens(self, prompts: int) -> list[list[int]]:
        """`counts` of so many prompts, the first of the beams of each; [] where none has run."""
        return self.counts[:: max(1, len(self.counts) // max(1, prompts))]


def check_layers(host: Host, layers: Sequence[nn.Module], inner: Inner) -> None:
    """Raises:
    ValueError: layers that cannot be given fewer tokens, or too few.
    """
    name, config = type(host.model).__name__, host.model.config.get_text_config()
    where = f"method {host.method!r} works between the layers of a language model, and those of {name}"
    if len(layers) < inner.layers:
        raise ValueError(f"{where} are {len(layers)}: expected {inner.layers} or more, or an earlier layer")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"{where} are of {', '.join(sorted(kinds))}: expected all of full attention")
    if any("self_attn" not in dict(layer.named_children()) for layer in layers):
        raise ValueError(f"{where} have no module 'self_attn': expected one in each, whose attention can be read")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise ValueError(f"{where} have embeddings of their own for each token: expected states alone")
    if inner.behind_attention:
        for layer in layers:
            children = {child for child, _ in layer.named_children()}
            if children - _AFTER != _HALVES:
                raise ValueError(
                    f"{where} have {', '.join(sorted(children))}; it makes tokens fewer behind their attention, which "
                    f"is known of layers with {', '.join(sorted(_HALVES))} alone: choose another method"
                )
