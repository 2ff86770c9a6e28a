"""Pretrain data/gpt2-mini, the small GPT-2 that the project ships so that everything runs without a model hub.

    python scripts/pretrain_base.py --books FOLDER --work-dir runs/gpt2-mini --tokens 40e6
    python scripts/pretrain_base.py --books FOLDER --work-dir runs/gpt2-mini --tokens 60e6    # goes on, for longer
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/pretrain_base.py ...     # on a CPU: one process a core

Trains a byte-level BPE tokenizer and a GPT-2 (transformers' own class) of 1,024 positions on every .txt under --books
that shares no text with a held-out document. Muon for the matrices inside the blocks, AdamW for the rest; a
warm-up, a constant rate and a linear decay over the last part of --tokens, so that a run can be prolonged. What is
done is kept in --work-dir: killed and started again, it goes on from the last checkpoint (the batches are a function
of the step alone); the one before it is kept, too. --init-from starts a new run from a trained model and its tokenizer.
The result, `--work-dir/model`, is a Hugging Face folder in float16 with a log beside it.
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
import torch.distributed as dist
from overlap import held_out_shingles, overlapping
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from recur_gpt2.ops.cross_entropy import summed_loss
from recur_gpt2.utils.allocator import tune_allocator

END = "<|endoftext|>"
POSITIONS = 1024
WARMUP = 100  # steps
LENGTHS = (64, 128, 256, 512, 1024)  # windows of the card's table
SETTINGS = ("tokens", "batch", "lr", "decay", "seed", "init_from")  # named in the card
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
    add("--init-from", type=Path, help="folder of a model, with its tokenizer, to start from")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args()
    tune_allocator()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if is_first():
        prepare(args)
    if dist.is_initialized():
        dist.barrier()
    books, tokenizer, train, held_out = prepare(args)
    model, log = pretrain(args, tokenizer, train, held_out["validation"])
    losses = [loss_row(model, held_out, length) for length in LENGTHS]
    if is_first():
        write_book_list(args, books)
        write_card(args, model, log, len(train), losses)
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare(args):
    """Books, tokenizer, training tokens, {"validation", "test"}: (tokens, bytes a token); kept in --work-dir."""
    books = training_books(args)
    tokenizer = train_tokenizer(args, books)
    train = tokenise(args.work_dir / "train.npy", tokenizer, books)
    held_out = {}
    for split in ("validation", "test"):
        texts = held_out_texts(args.data / "pg19-sample" / f"{split}.parquet")
        tokens = tokenise(args.work_dir / f"{split}.npy", tokenizer, texts)
        held_out[split] = tokens, sum(len(text.encode()) for text in texts) / len(tokens)
    return books, tokenizer, train, held_out


# ---- processes ---------------------------------------------------------------------------------------------------


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def own_share(rows):
    """Of rows that every process knows, those that this one computes."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def sum_over_processes(tensors):
    """Sum each tensor over the processes, in place: all of them in one message."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


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
    if args.init_from:
        return PreTrainedTokenizerFast.from_pretrained(args.init_from)
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


def pretrain(args, tokenizer, train, validation):
    torch.manual_seed(args.seed)
    model = initial_model(args, tokenizer)
    optimizers = make_optimizers(model, args.lr)
    tokens_per_step = args.batch * POSITIONS
    steps = int(args.tokens / tokens_per_step)
    start, seconds, log = load_checkpoint(args, model, optimizers)
    model.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, mininterval=10, disable=not is_first())
    losses, began = [], time.perf_counter()
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step, steps, args.decay)
        losses.append(train_step(model, optimizers, batch_of(train, step, args.batch, args.seed), step))
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            row = {
                "step": step + 1,
                "tokens": (step + 1) * tokens_per_step,
                "seconds": round(seconds + time.perf_counter() - began),
                "train_nats": float(np.mean(losses[-args.eval_every :])),
                **{f"validation_nats_{length}": evaluate(model, validation[0], length) for length in (256, POSITIONS)},
            }
            row["validation_bits_per_byte"] = row[f"validation_nats_{POSITIONS}"] / math.log(2) / validation[1]
            log.append(row)
            if is_first():
                tqdm.write(json.dumps(row))
                save_checkpoint(args, model, optimizers, step + 1, row["seconds"], log)
                save_model(args, model, tokenizer, log)
    return model, log


def initial_model(args, tokenizer):
    if args.init_from:
        model = GPT2LMHeadModel.from_pretrained(args.init_from, dtype=torch.float32)
    else:
        model = GPT2LMHeadModel(gpt2_config(args, tokenizer))
    for block in model.transformer.h:
        # Within 0.0002 nats of the tanh formula in config.json, and five times as fast in bfloat16 on a CPU.
        block.mlp.act = torch.nn.GELU()
    return model.to(args.device)


def train_step(model, optimizers, batch, step):
    """One step on a batch (B, 1025) of token ids -> its mean loss in nats."""
    count = batch[:, 1:].size
    loss = next_token_loss(model, torch.from_numpy(own_share(batch)).to(model.device)) / count
    loss.backward()
    total = loss.detach()
    sum_over_processes([total, *(parameter.grad for parameter in model.parameters())])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {step}: the gradient is not finite; the last checkpoint is kept")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total.item()


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


def rate(step, steps, decay):
    return min(1.0, (step + 1) / WARMUP, (steps - step) / max(1.0, decay * steps))


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


def next_token_loss(model, batch):
    """(B, N + 1) token ids -> the summed loss of N tokens a row, in nats."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        hidden = model.transformer(batch[:, :-1], use_cache=False).last_hidden_state
        return summed_loss(hidden, model.lm_head.weight, batch[:, 1:])


@torch.no_grad()
def evaluate(model, tokens, length=POSITIONS, pieces=64):
    """Mean nats over `pieces` stretches spread evenly over the held-out books, read in windows of `length`."""
    model.eval()
    starts = np.linspace(0, len(tokens) - POSITIONS - 1, pieces).astype(int)
    total = torch.zeros(())
    for start in own_share(starts):
        stretch = torch.from_numpy(tokens[start : start + POSITIONS + 1].astype(np.int64)).to(model.device)
        total += next_token_loss(model, stretch.unfold(0, length + 1, length)).cpu()
    sum_over_processes([total])
    model.train()
    return total.item() / (pieces * POSITIONS)


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
    temporary, newest = args.work_dir / "checkpoint.tmp", args.work_dir / "checkpoint.safetensors"
    meta = {"step": str(step), "seconds": str(seconds), "log": json.dumps(log)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=meta)
    if newest.exists():
        newest.replace(args.work_dir / "previous.safetensors")
    temporary.replace(newest)


def load_checkpoint(args, model, optimizers):
    kept = [args.work_dir / "checkpoint.safetensors", args.work_dir / "previous.safetensors"]
    path = next((path for path in kept if path.exists()), None)
    if path is None:
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


def write_card(args, model, log, train_tokens, losses):
    """README.md beside the model: settings, curve, and the loss by window length."""
    config, last = model.config, log[-1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}
    lines = [
        "# gpt2-mini",
        "",
        f"A GPT-2 of {parameters / 1e6:.1f}M parameters ({config.n_layer} layers, width {config.n_embd}, "
        f"{config.n_head} heads, {config.n_positions:,} positions, {config.vocab_size:,} byte-level BPE entries),",
        f"pretrained on the {train_tokens / 1e6:.1f}M tokens of the books in training_books.csv. It exists so that",
        "recur_gpt2 runs without a model hub; it is no model to write with. No book of the bundled samples is among",
        "its training books (`scripts/overlap.py`, `tests/data/test_bundled.py`).",
        "",
        "Made by `scripts/pretrain_base.py`: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        f"{last['tokens'] / 1e6:.1f}M tokens in {last['seconds'] / 60:.0f} minutes on {args.device}.",
        "",
        "## Held-out loss",
        "",
        "On 64 stretches of 1,024 tokens, spread evenly over the nine validation books of `data/pg19-sample` (Chaucer",
        "and a volume of The Golden Bough are among them), and over its 18 test books, read in windows of",
        "",
        "| window | validation, nats a token | bits a byte | test, nats a token | bits a byte |",
        "|---|---|---|---|---|",
        *losses,
        "",
        "## Curve",
        "",
        "Nats a token on the training books, and on the validation books in windows of 256 and of 1,024.",
        "",
        "| step | tokens | training | validation, 256 | validation, 1,024 | bits a byte |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['step']:,} | {row['tokens'] / 1e6:.1f}M | {row['train_nats']:.4f} "
            f"| {row['validation_nats_256']:.4f} | {row['validation_nats_1024']:.4f} "
            f"| {row['validation_bits_per_byte']:.4f} |"
            for row in log
        ),
    ]
    (args.work_dir / "model" / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def loss_row(model, held_out, length):
    cells = [f"{length:,}"]
    for tokens, bytes_per_token in held_out.values():
        nats = evaluate(model, tokens, length)
        cells += [f"{nats:.4f}", f"{nats / math.log(2) / bytes_per_token:.4f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
