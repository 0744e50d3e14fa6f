"""Models for the evaluation harness lm-eval, and the verb `eval` (docs/INTEROP.md, 6)."""
