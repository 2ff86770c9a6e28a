"""Pretrain data/gpt2-mini, the small GPT-2 that the project ships so that everything runs without a model hub.

    python scripts/pretrain_base.py --books FOLDER --work-dir runs/gpt2-mini --tokens 40e6
    python scripts/pretrain_base.py --books FOLDER --work-dir runs/gpt2-mini --tokens 60e6    # goes on, for longer

Trains a byte-level BPE tokenizer and a GPT-2 (transformers' own class) of 1,024 positions on every .txt under --books
that shares no text with a held-out document. Muon for the matrices inside the blocks, AdamW for the rest; a
warm-up, a constant rate and a linear decay over the last part of --tokens, so that a run can be prolonged. What is
done is kept in --work-dir: killed and started again, it goes on from the last checkpoint (the batches are a function
of the step alone). The result, `--work-dir/model`, is a Hugging Face folder in float16 with a log beside it.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from overlap import held_out_shingles, overlapping
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from recur_gpt2.allocator import tune_allocator

END = "<|endoftext|>"
POSITIONS = 1024
SETTINGS = ("tokens", "batch", "lr", "decay", "seed")  # named in the card
HELD_OUT = ["pg19-sample/train", "pg19-sample/validation", "pg19-sample/test"]
HELD_OUT += ["wikitext-103-sample/validation", "wikitext-103-sample/test"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--books", type=Path, required=True, help="folder of .txt files, searched recursively")
    add("--books-csv", type=Path, help="one row a book (file, title, author, gutenberg_id), for the list in the card")
    add("--data", type=Path, default=Path("data"), help="folder of the bundled samples, which are held out")
    add("--work-dir", type=Path, required=True, help="tokens, checkpoints, log and result")
    add("--tokens", type=float, default=40e6, help="tokens to train on in all")
    add("--vocab-size", type=int, default=8192)
    add("--width", type=int, default=256)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=4)
    add("--batch", type=int, default=8, help="sequences of 1,024 tokens a step")
    add("--lr", type=float, default=3e-3, help="peak learning rate, Muon (RMS-matched) and AdamW alike")
    add("--decay", type=float, default=0.4, help="share of the steps over which the rate falls to zero")
    add("--eval-every", type=int, default=500, help="steps between evaluations and checkpoints")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args()
    tune_allocator()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    books = training_books(args)
    tokenizer = train_tokenizer(args, books)
    train = tokenise(args.work_dir / "train.npy", tokenizer, books)
    validation_texts = held_out_texts(args.data / "pg19-sample" / "validation.parquet")
    validation = tokenise(args.work_dir / "validation.npy", tokenizer, validation_texts)
    bytes_per_token = sum(len(text.encode()) for text in map(read, validation_texts)) / len(validation)
    model, log = pretrain(args, tokenizer, train, validation, bytes_per_token)
    write_book_list(args, books)
    write_card(args, model, log, len(train), validation, bytes_per_token)


# ---- text --------------------------------------------------------------------------------------------------------


def read(text):
    return text.read_text(encoding="utf-8") if isinstance(text, Path) else text


def held_out_texts(path):
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["text"]).column("text").to_pylist()


def training_books(args):
    """Paths of the books that share no text with a held-out document; the list is kept in books.json."""
    listing = args.work_dir / "books.json"
    if not listing.exists():
        held_out = held_out_shingles([args.data / f"{name}.parquet" for name in HELD_OUT])
        books, left_out = [], {}
        for path in tqdm(sorted(args.books.rglob("*.txt")), desc="checking books"):
            clashes = overlapping(read(path), held_out)
            if clashes:
                left_out[path.name] = clashes
            else:
                books.append(str(path.relative_to(args.books)))
        write_json(listing, {"books": books, "left_out": left_out})
    return [args.books / name for name in json.loads(listing.read_text())["books"]]


def train_tokenizer(args, books):
    folder = args.work_dir / "tokenizer"
    if not folder.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=args.vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(map(read, books), trainer, length=len(books))
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=POSITIONS
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tokenise(path, tokenizer, texts):
    """Every text followed by the end-of-text token, as one memory-mapped uint16 array."""
    if not path.exists():
        pieces = []
        for text in tqdm(texts, desc=f"tokenising {path.stem}"):
            ids = tokenizer.backend_tokenizer.encode(read(text)).ids
            pieces.append(np.array([*ids, tokenizer.eos_token_id], np.uint16))
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, np.concatenate(pieces))
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


# ---- training ----------------------------------------------------------------------------------------------------


def pretrain(args, tokenizer, train, validation, bytes_per_token):
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(gpt2_config(args, tokenizer)).to(args.device)
    optimizers = make_optimizers(model, args.lr)
    tokens_per_step = args.batch * POSITIONS
    steps = int(args.tokens / tokens_per_step)
    start, seconds, log = load_checkpoint(args, model, optimizers)
    model.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="pretraining", mininterval=10)
    losses, began = [], time.perf_counter()
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step, steps, args.decay)
        batch = torch.from_numpy(batch_of(train, step, args.batch, args.seed)).to(args.device)
        loss = next_token_loss(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite; the last checkpoint is kept")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            elapsed = seconds + time.perf_counter() - began
            nats = evaluate(model, validation, args.device)
            log.append(
                {
                    "step": step + 1,
                    "tokens": (step + 1) * tokens_per_step,
                    "seconds": round(elapsed),
                    "train_nats": float(np.mean(losses[-args.eval_every :])),
                    "validation_nats": nats,
                    "validation_bits_per_byte": nats / math.log(2) / bytes_per_token,
                }
            )
            tqdm.write(json.dumps(log[-1]))
            save_checkpoint(args, model, optimizers, step + 1, elapsed, log)
            save_model(args, model, tokenizer, log)
    return model, log


def gpt2_config(args, tokenizer):
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        activation_function="gelu_pytorch_tanh",  # gelu_new's formula in one fused kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_optimizers(model, lr):
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    decayed = [{"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.01}]
    decayed += [{"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decayed, lr=lr, betas=(0.9, 0.95), eps=1e-10),
    ]


def rate(step, steps, decay, warmup=100):
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def batch_of(tokens, step, batch, seed):
    """Batch number `step` of an endless stream of epochs; an epoch visits each 1,024-token piece once, shuffled."""
    pieces = (len(tokens) - 1) // POSITIONS - 1
    rows = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(index, pieces)
        rng = np.random.default_rng((seed, epoch))
        offset = int(rng.integers(POSITIONS))
        piece = int(permutation(seed, epoch, pieces)[place])
        rows.append(tokens[offset + piece * POSITIONS :][: POSITIONS + 1])
    return np.stack(rows).astype(np.int64)


def permutation(seed, epoch, pieces, _cache={}):  # noqa: B006 (one epoch's order is kept)
    if (seed, epoch, pieces) not in _cache:
        _cache.clear()
        _cache[seed, epoch, pieces] = np.random.default_rng((seed, epoch, 1)).permutation(pieces)
    return _cache[seed, epoch, pieces]


def next_token_loss(model, batch, reduction="mean"):
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model, tokens, device, length=POSITIONS, pieces=64):
    """Mean nats over `pieces` stretches spread evenly over the held-out books, read in windows of `length`."""
    model.eval()
    starts = np.linspace(0, len(tokens) - POSITIONS - 1, pieces).astype(int)
    total = count = 0
    for start in starts:
        stretch = torch.from_numpy(tokens[start : start + POSITIONS + 1].astype(np.int64)).to(device)
        windows = stretch.unfold(0, length + 1, length)
        total += next_token_loss(model, windows, reduction="sum").item()
        count += windows.shape[0] * length
    model.train()
    return total / count


# ---- what is kept ------------------------------------------------------------------------------------------------


def write_json(path, value):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.rename(path)


def save_checkpoint(args, model, optimizers, step, seconds, log):
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    temporary = args.work_dir / "checkpoint.tmp"
    meta = {"step": str(step), "seconds": str(seconds), "log": json.dumps(log)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=meta)
    temporary.rename(args.work_dir / "checkpoint.safetensors")


def load_checkpoint(args, model, optimizers):
    path = args.work_dir / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0, []
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    for name, p in model.named_parameters():
        p.data.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        states = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".", 3)
                states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return int(meta["step"]), float(meta["seconds"]), json.loads(meta["log"])


def save_model(args, model, tokenizer, log):
    folder = args.work_dir / "model"
    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(args.work_dir / "log.json", log)


def write_book_list(args, books):
    """training_books.csv beside the model: what it was trained on, for the check against held-out books."""
    described = {}
    if args.books_csv:
        described = {row["file"]: row for row in csv.DictReader(args.books_csv.open(encoding="utf-8"))}
    fields = ["file", "title", "author", "gutenberg_id", "sha256"]
    with (args.work_dir / "model" / "training_books.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for path in books:
            name = path.relative_to(args.books).as_posix()
            row = described.get(name, {"title": path.stem})
            writer.writerow({**row, "file": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})


def write_card(args, model, log, train_tokens, validation, bytes_per_token):
    """README.md beside the model: settings, curve, and the loss by window length."""
    lengths = {length: evaluate(model, validation, args.device, length) for length in (64, 128, 256, 512, 1024)}
    per_byte = math.log(2) * bytes_per_token
    config, last = model.config, log[-1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    lines = [
        "# gpt2-mini",
        "",
        f"A GPT-2 of {parameters / 1e6:.1f}M parameters ({config.n_layer} layers, width {config.n_embd}, "
        f"{config.n_head} heads, {config.n_positions:,} positions, {config.vocab_size:,} byte-level BPE entries),",
        f"pretrained on the {train_tokens / 1e6:.1f}M tokens of the books in training_books.csv. It exists so that",
        "recur_gpt2 runs without a model hub; it is no model to write with. No book of the bundled samples is among",
        "its training books (`scripts/overlap.py`, `tests/test_data.py`).",
        "",
        "Made by `scripts/pretrain_base.py`: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        f"{last['tokens'] / 1e6:.1f}M tokens in {last['seconds'] / 60:.0f} minutes on {args.device}.",
        "",
        "## Held-out loss",
        "",
        "On 64 stretches of 1,024 tokens, spread evenly over the nine validation books of `data/pg19-sample` (Chaucer",
        "and a volume of The Golden Bough are among them), read in windows of",
        "",
        "| window | nats per token | bits per byte |",
        "|---|---|---|",
        *(f"| {length:,} | {nats:.4f} | {nats / per_byte:.4f} |" for length, nats in lengths.items()),
        "",
        "## Curve",
        "",
        "| step | tokens | training nats | validation nats | validation bits per byte |",
        "|---|---|---|---|---|",
        *(
            f"| {row['step']:,} | {row['tokens'] / 1e6:.1f}M | {row['train_nats']:.4f} | {row['validation_nats']:.4f} "
            f"| {row['validation_bits_per_byte']:.4f} |"
            for row in log
        ),
    ]
    (args.work_dir / "model" / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
