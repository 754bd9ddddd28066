"""Building blocks that know nothing of DeepSeek: linear, norm, MLP, and the batch that every layer receives."""
