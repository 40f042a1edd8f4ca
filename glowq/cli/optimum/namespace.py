"""The module `optimum.exporters.glowq` of an installed glowq. Its import registers glowq with `TasksManager`."""

from __future__ import annotations

from glowq.integrations.optimum import GlowQExporterConfig, main_export, register

__all__ = ["GlowQExporterConfig", "main_export"]

register()
