"""Finetuning: loop, optimizer, truncated BPTT, activation checkpointing, checkpoints, distillation, distributed."""
