"""Generation: the engine owns the cache and drives the same Transformer that training updates."""
