"""Usage reports: a recipe with one of our plugins sends none of Axolotl's, unless the user says so."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from axolotl.telemetry.manager import TelemetryManager

from thinkswitch_plugin.on_policy_kl import OnPolicyKLPlugin
from thinkswitch_plugin.tah import TaHPlugin
from thinkswitch_plugin.trace_stripping import TraceStrippingPlugin

RECIPES: list[tuple[type, dict[str, Any]]] = [
    (TraceStrippingPlugin, {"datasets": [{"path": "x", "type": "thinkswitch_plugin.trace_stripping"}]}),
    (OnPolicyKLPlugin, {"on_policy_kl": {"teacher": "self"}}),
    (TaHPlugin, {"tah": {"stage": "none such"}}),
]


@pytest.mark.parametrize(("said", "sent"), [(None, False), ("", False), ("0", True)])
@pytest.mark.parametrize(("plugin", "recipe"), RECIPES)
def test_no_report_is_sent(
    monkeypatch: pytest.MonkeyPatch, plugin: type, recipe: dict[str, Any], said: str | None, sent: bool
) -> None:
    manager = TelemetryManager.get_instance()
    monkeypatch.setattr(manager, "enabled", True)
    monkeypatch.delenv("AXOLOTL_DO_NOT_TRACK", raising=False)
    if said is not None:
        monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", said)
    listed = f"{plugin.__module__.removesuffix('.plugin')}.{plugin.__name__}"
    with suppress(ValueError):  # of two recipes the rest is none
        plugin().register({**recipe, "plugins": [listed]})
    assert manager.enabled is sent


def test_a_recipe_without_our_plugins_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = TelemetryManager.get_instance()
    monkeypatch.setattr(manager, "enabled", True)
    monkeypatch.delenv("AXOLOTL_DO_NOT_TRACK", raising=False)
    TraceStrippingPlugin().register({"plugins": ["another.Plugin"]})
    assert manager.enabled
