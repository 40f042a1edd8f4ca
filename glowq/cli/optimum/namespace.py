"""`optimum.exporters.glowq`, which is this file in an installed glowq: importing it tells `TasksManager`."""

from __future__ import annotations

from glowq.integrations.optimum import GlowQExporterConfig, main_export, register

__all__ = ["GlowQExporterConfig", "main_export"]

register()
