"""Helpers that several test files share: the table of bases, checkpoint writers, tiny models, a local Hub, commands."""
