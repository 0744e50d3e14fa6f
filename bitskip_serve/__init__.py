"""The HTTP server: OpenAI's routes over the scheduler of `bitskip_cpu.many` (docs/SERVING.md)."""
