"""Text and token ids: one loader of tokenizers for the trainer, the exporter and the runtime."""
