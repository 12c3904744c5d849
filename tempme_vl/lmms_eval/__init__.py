"""The plug-in for lmms-eval: a compressed video-language model runs there by its name, `--model tempme_vl`.

pyproject.toml names `manifest` among the entry points that the harness loads on its start. So nothing heavy is imported
here, and nothing of the harness before it calls.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval has to know of the model: a `ModelManifest`."""
    from tempme_vl.libraries import undocumented

    with undocumented("lmms-eval"):
        from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tempme_vl", simple_class_path="tempme_vl.lmms_eval.model.TempMe")
