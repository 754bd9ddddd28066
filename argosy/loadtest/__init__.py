"""Load on any OpenAI-compatible endpoint, and what its clients saw. Knows nothing of the engine."""
