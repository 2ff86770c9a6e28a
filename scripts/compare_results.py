"""Whether a change of the code left every result as it was, bit for bit: for work that is to change no behaviour.

    git worktree add ../before COMMIT && PYTHONPATH=../before python scripts/compare_results.py save before.safetensors
    PYTHONPATH=. python scripts/compare_results.py save after.safetensors
    python scripts/compare_results.py compare before.safetensors after.safetensors

`save` uses public names and commands alone. For every form of memory and of attention, on a small GPT-2 of random
weights: logits and states of ragged batches, read at once and in pieces, losses and gradients in float32 and bfloat16,
greedy and beam-searched tokens; then embeddings of the bundled model, and short finetunings by the command line, killed
and resumed as well, with their scores. On a CPU, one thread; some minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

DATA = Path(__file__).resolve().parents[1] / "data"
WINDOW = 16
YOSHIDA = {"recurrence": "yoshida2020"}
LINEAR = {"linear_layers": "all", "feature_size": 6}
NEAR = LINEAR | {"near_tokens": 5}
FORMS = {
    "default": {},
    "all_slots": {"sink_slots": 2, "pooled_slots": 2, "last_slots": 3, "insert_layers": [1, 3]},
    "gated": {"sink_slots": 0, "pooled_slots": 2, "last_slots": 0},
    "yoshida2020": YOSHIDA,
    "pooled_above": YOSHIDA | {"pooled_slots": 3, "insert_layers": [0, 2], "pool_layers": [1, 3]},
    "pooled_below": YOSHIDA | {"pooled_slots": 2, "insert_layers": [2, 3], "pool_layers": [0, 1]},
    "none": {"recurrence": "none"},
    "t2r": LINEAR,
    "t2r_some": LINEAR | {"linear_layers": "75%", "pooled_slots": 2},
    "hedgehog_yoshida2020": LINEAR | YOSHIDA | {"feature_map": "hedgehog"},
    "elu_gated": LINEAR | {"feature_map": "elu", "sink_slots": 0, "pooled_slots": 2, "last_slots": 0},
    "rfa_none": LINEAR | {"feature_map": "rfa", "recurrence": "none"},
    "carried": LINEAR | {"carry_linear_state": True},
    "near": NEAR,
    "near_carried": NEAR | {"linear_layers": [1, 2], "carry_linear_state": True, "pooled_slots": 1},
    "near_yoshida2020": NEAR | YOSHIDA,
    "near_few_slots": NEAR | {"near_tokens": 2, "last_slots": 8},
}
FINETUNINGS = {
    "default": [],
    "checkpointing": ["--checkpointing", "--accumulate", "2", "--precision", "bfloat16"],
    "yoshida2020": ["--recurrence", "yoshida2020", "--parallel-windows", "2"],
    "t2r": ["--attention", "t2r", "--near-tokens", "16", "--transfer-steps", "2", "--new-first-steps", "1"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    save = commands.add_parser("save", help="compute every result with the recur_gpt2 that is imported")
    save.add_argument("output", type=Path)
    compare = commands.add_parser("compare", help="compare two files; exit status 1 where a bit differs")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        sys.exit(compared(load_file(args.before), load_file(args.after)))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    results = {}
    with TemporaryDirectory() as folder:
        for name, options in FORMS.items():
            print(name, file=sys.stderr, flush=True)
            results |= {f"{name}/{key}": value for key, value in of_form(options, Path(folder)).items()}
        print("embeddings", file=sys.stderr, flush=True)
        results |= embeddings()
        for name, flags in FINETUNINGS.items():
            print("finetuning", name, file=sys.stderr, flush=True)
            results |= finetuning(name, flags, Path(folder))
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in results.items()}, args.output)
    print(f"{len(results):,} tensors in {args.output}")


def of_form(options, folder):
    from recur_gpt2 import RecurGPT2LMHeadModel

    model = RecurGPT2LMHeadModel.from_gpt2(str(random_gpt2(folder)), window=WINDOW, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # no parameter at zero or one by accident
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(97, (3, 90), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :25], mask[2, 70:] = 0, 0
    results = {f"weights.{name}": tensor for name, tensor in model.named_parameters()}
    results = {name: tensor.clone() for name, tensor in results.items()}
    results |= readings(model, ids, mask) | gradients(model, ids, mask) | generated(model.eval(), ids[:2], mask[:2])
    model.eval().fuse_feature_maps()
    with torch.no_grad():
        results["fused.logits"] = model(ids, mask, parallel_windows=3).logits
    return results


@torch.no_grad()
def readings(model, ids, mask):
    results, state = {}, None
    for windows in (1, 3):
        out = model.eval()(ids, mask, parallel_windows=windows)
        results |= {f"at_once_{windows}.logits": out.logits} | of_state(f"at_once_{windows}", out.state)
    for start, end in ((0, 7), (7, 8), (8, 40), (40, 41), (41, 90)):
        if not bool(mask[:, start:end].any()):
            continue
        out = model(ids[:, start:end], mask[:, start:end], state=state, parallel_windows=2, output_hidden_states=True)
        state = out.state
        results[f"pieces_{start}.logits"] = out.logits
        results |= {f"pieces_{start}.hidden_{n}": hidden for n, hidden in enumerate(out.hidden_states)}
        results |= of_state(f"pieces_{start}", state)
    return results


def of_state(name, state):
    tensors = {f"{name}.state.windows": state.windows, f"{name}.state.filled": state.filled}
    tensors |= {f"{name}.state.memory.{key}": tensor for key, tensor in state.memory.items()}
    return tensors | {f"{name}.state.window.{key}": tensor for key, tensor in state.window.items()}


def gradients(model, ids, mask):
    results = {}
    for kind, autocast in (("float32", False), ("bfloat16", True)):
        for windows in (1, 3):
            model.train().zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(ids, mask, labels=ids, parallel_windows=windows).loss
            loss.backward()
            name = f"{kind}_{windows}"
            results[f"{name}.loss"] = loss
            for key, parameter in model.named_parameters():
                if parameter.grad is not None:
                    results[f"{name}.gradient.{key}"] = parameter.grad.clone()
    return results


@torch.no_grad()
def generated(model, ids, mask):
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **options)
    cache = getattr(greedy, "cache", None) or greedy.past_key_values
    return {
        "greedy": greedy.sequences,
        "greedy.logits": torch.stack(greedy.logits),
        "beams": beams,
        **of_state("generated", cache.state()),
    }


def random_gpt2(folder):
    path = folder / "gpt2"
    if not path.exists():
        torch.manual_seed(0)
        options = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 97, "n_positions": 64}
        options |= {"bos_token_id": 0, "eos_token_id": 0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        GPT2LMHeadModel(GPT2Config(**options)).save_pretrained(path)
    return path


def texts():
    import pyarrow.parquet as pq

    books = pq.read_table(DATA / "pg19-sample" / "test.parquet", columns=["text"]).column("text").to_pylist()
    return [books[0][:9000], books[1][:500], books[2][:4000], "One."]


def embeddings():
    from recur_gpt2 import DocumentEmbedder

    embedder = DocumentEmbedder.from_pretrained(str(DATA / "recur-gpt2-mini"))
    results = {}
    for pooling in ("mean", "last", "memory", "mean+memory"):
        results[f"embeddings.{pooling}"] = torch.from_numpy(embedder.encode(texts(), pooling=pooling))
    results["embeddings.layer_3"] = torch.from_numpy(embedder.encode(texts(), layer=3))
    return results


def finetuning(name, flags, folder):
    output, text = folder / f"finetuned-{name}", folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts() * 8), encoding="utf-8")
    common = ["--data", str(text), "--window", "64", "--lanes", "2", "--bptt", "2", "--save-every", "2"]
    common += ["--eval-tokens", "3000", "--output-dir", str(output)]
    common += [] if "--precision" in flags else ["--precision", "float32"]
    command(folder, "finetune", *common, *flags, "--steps", "6")
    results = {}
    for part in ("recurrent", "disjoint"):
        for key, tensor in load_file(output / part / "model" / "model.safetensors").items():
            results[f"finetuned.{name}.{part}.{key}"] = tensor
    written = json.loads((output / "results.json").read_text())
    for row, losses in written["loss_by_document"].items():
        results[f"finetuned.{name}.nats.{row}"] = torch.tensor(losses, dtype=torch.float64)
    return results


def command(folder, *words):
    """Run a command in a folder where no other recur_gpt2 lies."""
    run = [sys.executable, "-m", "recur_gpt2.cli", *words]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")


def compared(before, after):
    """Print what differs, or that nothing does. -> exit status"""
    alone = sorted(before.keys() ^ after.keys())
    for name in alone:
        print(f"{name}: only {'before' if name in before else 'after'}")
    differing = [name for name in sorted(before.keys() & after.keys()) if not same(name, before, after)]
    for name in differing:
        one, other = before[name], after[name]
        far = (one.double() - other.double()).abs().max() if one.shape == other.shape else "another shape"
        print(f"{name}: differs by {far}")
    equal = len(before.keys() & after.keys()) - len(differing)
    print(f"{equal:,} of {len(before.keys() | after.keys()):,} tensors are equal bit for bit")
    return 1 if alone or differing else 0


def same(name, before, after):
    one, other = before[name], after[name]
    state, _, part = name.partition(".state.")
    if part.startswith("window."):  # of rows whose windows have begun; what it holds of others means nothing
        begun = before[f"{state}.state.filled"] > 0
        one, other = one[begun], other[begun]
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


if __name__ == "__main__":
    main()
