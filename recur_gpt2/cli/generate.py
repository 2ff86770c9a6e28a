"""`recur-gpt2 generate`: text as it comes on standard output, everything else on standard error."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..data.bundle import BUNDLED_RECURRENT
from ..errors import LARGEST_FLOAT, LARGEST_SEED, InputError, check_range
from ..utils.files import check_can_write, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default=str(BUNDLED_RECURRENT),
        help="our model or a GPT-2: folder or hub id (default: data/recur-gpt2-mini)",
    )
    add("--window", type=int, help="T; default: the model's own, or 256 for a GPT-2")
    add("--recurrence", default="default", help="for a GPT-2: default (untrained), yoshida2020 or none")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to go on from")
    prompt.add_argument("--prompt-file", type=Path, help="the same, a UTF-8 file of any length")
    add("--max-new-tokens", type=int, default=200, help="to write at most, 0: read alone (default: 200)")
    add("--greedy", action="store_true", help="take the likeliest token each time, in place of drawing one")
    add("--temperature", type=float, default=0.8, help="below 1: likely tokens are drawn more often (default: 0.8)")
    add("--top-k", type=int, default=0, help="draw among the k likeliest, 0 for all (default)")
    add("--top-p", type=float, default=0.95, help="draw among the likeliest that make up p (default: 0.95)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions (default: 1)")
    add("--ignore-eos", action="store_true", help="write on after the token that ends a text")
    add("--seed", type=int, help="of what is drawn (default: another one each time)")
    add("--state-in", type=Path, help="go on where this file of an earlier run was left; a prompt is read after it")
    add("--state-out", type=Path, help="file to write the state to at the end, or after Ctrl-C")
    add("--precision", default="float32", choices=["float32", "bfloat16"], help="of weights and all (default: float32)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one")


def run(args: argparse.Namespace) -> None:
    """Read, write, say how fast, save."""
    import torch

    prompt = _prompt(args)
    session = _session(args)
    if args.state_in is not None:
        session.load(args.state_in)
    _read(session, prompt)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.max_new_tokens:
        began = time.perf_counter()
        written = session.write(args.max_new_tokens, _print, **_options(args))
        seconds = time.perf_counter() - began
    if args.state_out is not None:  # before anything is printed: nobody may read it any more
        session.save(args.state_out)
    if args.max_new_tokens:
        print(flush=True)
        short = f", stopped before {args.max_new_tokens:,}" if written < args.max_new_tokens else ""
        print(f"{written:,} tokens{short}, {written / seconds:,.0f} tokens/s", file=sys.stderr)
    if args.state_out is not None:
        print(f"to go on: recur-gpt2 generate --state-in {args.state_out}", file=sys.stderr)


def _prompt(args):
    check_range(0, max_new_tokens=args.max_new_tokens, top_k=args.top_k)
    check_range(0, LARGEST_SEED, seed=args.seed)
    rates = {"temperature": args.temperature, "repetition_penalty": args.repetition_penalty}
    check_range(0, LARGEST_FLOAT, above=True, **rates)
    check_range(0, 1, above=True, top_p=args.top_p)
    if args.state_out is not None:
        check_can_write(args.state_out)
    return args.prompt if args.prompt_file is None else read_text(args.prompt_file)


def _session(args):
    import torch

    from ..models.hub import load_tokenizer
    from ..models.loading import load_any
    from ..utils.device import checked_device
    from .text_session import TextSession

    tokenizer = load_tokenizer(args.model)
    model = load_any(args.model, args.window, args.recurrence)
    return TextSession(model.to(checked_device(args.device), getattr(torch, args.precision)).eval(), tokenizer)


def _read(session, prompt):
    """The prompt; without any, the token that starts a text."""
    if prompt:
        session.read(session.tokenizer(prompt, verbose=False)["input_ids"], progress=True)
    elif session.state is None:
        session.read([session.model.config.bos_token_id])
    elif not session.can_write:
        raise InputError("--state-in holds a state without its last token; give a --prompt to go on with")


def _options(args):
    options = {"repetition_penalty": args.repetition_penalty, "do_sample": not args.greedy}
    if not args.greedy:
        options |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    return options | ({"eos_token_id": None} if args.ignore_eos else {})


def _print(text):
    print(text, end="", flush=True)
