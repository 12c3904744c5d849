"""Which hosts are tried by every test, and which by some: there are more of them than kinds of hosts.

A host that differs from another of these by little is the host itself where nothing merges, keeps as many tokens as
predicted, and is told apart in prompts; all else of it is a second case of what another one's tests hold.
"""

from __future__ import annotations

from pathlib import Path

import pytest

BESIDE_ANOTHER = {  # and the one
    "Qwen2-VL": "Qwen2.5-VL",
    "Qwen2.5-Omni": "Qwen2.5-VL",
    "Qwen3-VL-MoE": "Qwen3-VL",
    "Qwen3.5": "Qwen3-VL",
    "Qwen3.5-MoE": "Qwen3-VL",
    "GLM-4.5V": "GLM-4.1V",
    "GLM-4.6V": "GLM-4.1V",
    "GLM-4.1V": "Qwen3-VL",
    "VideoLLaMA 3": "Qwen2.5-VL",
    "Gemma 4, small": "InternVL",
    "Gemma 4, large": "InternVL",
    "Molmo2": "InternVL",
    "LlavaNextVideo": "LlavaOnevision",
}
OF_EVERY_HOST = (
    "test_without_merging_it_is_the_host_itself",
    "test_prompts_tell_the_clips",
    "test_counts_are_the_predicted_ones",
    "test_inside_a_tower_nothing_changes_where_nothing_merges",
)


@pytest.hookimpl(tryfirst=True)  # before those that are left out are chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent == here and hasattr(item, "callspec"):
            second = item.callspec.params.get("name") in BESIDE_ANOTHER
            if second and item.originalname not in OF_EVERY_HOST:
                item.add_marker(pytest.mark.slow)
