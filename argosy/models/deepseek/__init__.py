"""DeepSeek-V3.2: config, model, and the text format of its conversations."""
