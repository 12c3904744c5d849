"""What recipes and `deepspeed.initialize` import, for the process that ranks are forked from."""

import gc
from contextlib import suppress
from importlib import import_module

import recipes.runs  # noqa: F401

for name in (  # some have other names in older versions
    "deepspeed.runtime.zero.muon.original_muon",  # torch's compiler
    "deepspeed.module_inject.auto_ep_layer",
    "setuptools",  # deepspeed asks it for a compiler
    "peft",
    "transformers.models.video_llava.modeling_video_llava",
):
    with suppress(ImportError):
        import_module(name)

# what is there stays: no rank looks through it for garbage, which takes half a second each time and copies its memory
gc.freeze()
