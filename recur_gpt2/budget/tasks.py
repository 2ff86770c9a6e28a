"""What a memory budget is spent on."""

TASKS = ("train", "score", "embed", "generate")
STEP_TOKENS = 8192  # of a finetuning step, however many lanes it takes at a time: as the main job's


def t2r_flags(near_tokens: int) -> list[str]:
    """Linear attention in all layers, for `recur-gpt2 finetune`."""
    return ["--attention", "t2r", "--near-tokens", str(near_tokens)]
