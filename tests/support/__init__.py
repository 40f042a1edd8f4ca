"""What several test files share: the matrix of bases, writers of checkpoints, tiny models, a local Hub, commands."""
