"""The model: configuration, memory, state, generation, GPT-2 checkpoints, conversion to linear attention."""
