"""Models of other programs: Hugging Face folders and GGUF files, in and out (INTEROP)."""
