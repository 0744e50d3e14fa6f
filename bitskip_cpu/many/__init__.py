"""Many texts at once: a scheduler over one engine, the caches it lends, work without a server."""
