"""From logits to text: sampling, streams, drafts (SPEC 8, 9 and 11)."""
