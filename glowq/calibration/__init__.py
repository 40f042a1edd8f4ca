"""What text tells of a model: input moments, output gradients, measured gains of groups, distillation of factors.

May import `evaluation`, `solving` and what `evaluation` may import."""
