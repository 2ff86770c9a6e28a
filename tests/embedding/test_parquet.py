"""parquet.py and search.py: a row for every document, whatever happens, and the nearest ones found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose
from safetensors import safe_open
from safetensors.torch import save_file

from recur_gpt2 import DocumentEmbedder
from recur_gpt2.cli.main import main
from recur_gpt2.data.bundle import BUNDLED_MODEL, BUNDLED_RECURRENT
from recur_gpt2.embedding import parquet
from recur_gpt2.embedding.search import nearest

WORDS = "It rained in Oldtown and the river rose while Mr. Weston was away".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def embedder():
    return DocumentEmbedder.from_pretrained(BUNDLED_RECURRENT, device="cpu")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """30 documents in docs/, as the working directory's. -> {id: text}"""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    random, texts = np.random.default_rng(0), {}
    for number in range(30):
        name = f"docs/{number:02d}.txt"
        texts[name] = " ".join(random.choice(WORDS, size=number * 20))
        Path(name).write_text(texts[name])
    return texts


def embed(*flags, inputs=("docs",), output="e.parquet"):
    return main(["embed", *inputs, "-o", output, "--device", "cpu", "--batch-tokens", "256", *flags])


def rows(path="e.parquet"):
    table = pq.read_table(path)
    return {row["id"]: np.array(row["vector"]) for row in table.to_pylist()}, table


def assert_whole(texts, embedder, **options):
    found, table = rows()
    assert len(table) == len(texts)  # none twice
    assert found.keys() == texts.keys()
    assert_allclose([found[id] for id in texts], embedder.encode(texts.values(), **options), rtol=1e-4, atol=1e-5)
    assert not Path("e.parquet.parts").exists()


def test_every_document_has_a_row_in_order(texts, embedder, capsys):
    assert embed() == 0
    assert "30 documents embedded, 30 in e.parquet" in capsys.readouterr().out
    assert_whole(texts, embedder)
    table = pq.read_table("e.parquet")
    assert table["id"].to_pylist() == list(texts)
    assert table["characters"].to_pylist() == [len(text) for text in texts.values()]
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 256)
    assert set(table["model"].to_pylist()) == {parquet.fingerprint(embedder)}


@pytest.mark.parametrize("pooling", ["last", "mean+memory"])
def test_flags_are_those_of_encode(pooling, texts, embedder):
    assert embed("--pooling", pooling, "--layer", "4", "--normalize", "--dtype", "float16") == 0
    found, table = rows()
    assert table.schema.field("vector").type == pa.list_(pa.float16(), embedder.dimension(pooling))
    expected = embedder.encode(texts.values(), pooling=pooling, layer=4, normalize=True)
    assert_allclose([found[id] for id in texts], expected, atol=1e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on(texts, embedder):
    """Killed again and again, each time after its first part is on the disk."""
    script = "import sys; from recur_gpt2.embedding import embedder, parquet; parquet.PART_SECONDS = 0"
    script += "; embedder.CHUNK_BATCHES = 2; from recur_gpt2.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "embed", "docs", "-o", "e.parquet", "--device", "cpu"]
    parts, kills = Path("e.parquet.parts"), 0
    while not Path("e.parquet").exists():
        before = len(list(parts.glob("0*.parquet")))
        with subprocess.Popen([*command, "--batch-tokens", "256"], env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
            while run.poll() is None and len(list(parts.glob("0*.parquet"))) < before + 12:
                time.sleep(0.005)
            kills += run.poll() is None
            run.send_signal(signal.SIGKILL)
    assert kills >= 2
    assert embed() == 0
    assert_whole(texts, embedder)


def test_a_run_stopped_by_a_bad_file_keeps_what_it_has(texts, embedder, monkeypatch, capsys):
    monkeypatch.setattr("recur_gpt2.embedding.embedder.CHUNK_BATCHES", 1)
    Path("docs/20.txt").write_bytes(b"\xff")
    assert embed() == 2
    assert r"docs/20.txt is not UTF-8 at byte 0; convert it" in capsys.readouterr().err
    assert list(Path("e.parquet.parts").glob("0*.parquet"))
    assert not Path("e.parquet").exists()
    Path("docs/20.txt").write_text(texts["docs/20.txt"])
    assert embed() == 0
    assert int(capsys.readouterr().out.split()[0]) < 25
    assert_whole(texts, embedder)


def test_new_documents_join_those_embedded_before(texts, embedder, capsys):
    held_back = texts["docs/07.txt"]
    Path("docs/07.txt").unlink()
    assert embed() == 0
    Path("docs/07.txt").write_text(held_back)
    assert embed() == 0
    assert "1 documents embedded, 30 in e.parquet" in capsys.readouterr().out
    assert_whole(texts, embedder)
    before = Path("e.parquet").read_bytes()
    assert embed() == 0
    assert "0 documents embedded, 30 in e.parquet" in capsys.readouterr().out
    assert Path("e.parquet").read_bytes() == before


def test_shards_share_the_work(texts, embedder):
    for shard in ("1/3", "2/3", "3/3"):
        assert embed("--shard", shard, output=f"e{shard[0]}.parquet") == 0
    found = {id: vector for n in (1, 2, 3) for id, vector in rows(f"e{n}.parquet")[0].items()}
    assert sorted(found) == sorted(texts)
    assert_allclose([found[id] for id in texts], embedder.encode(texts.values()), rtol=1e-4, atol=1e-5)


CHANGES = {
    "pooling": ["--pooling", "last"],
    "layer": ["--layer", "3"],
    "dtype": ["--dtype", "float16"],
    "normalize": ["--normalize"],
    "fingerprint": ["--model", str(BUNDLED_MODEL)],
}


@pytest.mark.parametrize(("key", "flags"), CHANGES.items(), ids=CHANGES.keys())
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_do_not_mix(key, flags, finished, texts, capsys):
    assert embed() == 0
    if not finished:
        Path("e.parquet.parts").mkdir()
        settings = pq.read_schema("e.parquet").metadata[b"recur_gpt2"]
        Path("e.parquet.parts/settings.json").write_bytes(settings)
        Path("e.parquet").unlink()
    assert embed(*flags) == 2
    assert f"was made with {key}=" in capsys.readouterr().err


def test_another_file_is_not_overwritten(texts, capsys):
    pq.write_table(pa.table({"x": [1]}), "e.parquet")
    assert embed() == 2
    assert "e.parquet holds no vectors of recur-gpt2 embed" in capsys.readouterr().err
    Path("e.parquet").write_text("not parquet")
    assert embed() == 2
    assert "e.parquet is no readable parquet file" in capsys.readouterr().err
    assert Path("e.parquet").read_text() == "not parquet"


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b"])
def test_a_share_that_does_not_exist_is_refused(shard, texts, capsys):
    with pytest.raises(SystemExit):
        embed("--shard", shard)
    assert "is no share; give 1/4 for the first of four" in capsys.readouterr().err


def test_the_fingerprint_is_of_what_makes_vectors(embedder):
    other = DocumentEmbedder.from_pretrained(BUNDLED_RECURRENT, device="cpu")
    assert parquet.fingerprint(other) == parquet.fingerprint(embedder)
    other.model.transformer.ln_f.bias.data[0] += 1
    assert parquet.fingerprint(other) != parquet.fingerprint(embedder)
    windows = (DocumentEmbedder.from_pretrained(BUNDLED_MODEL, window, device="cpu") for window in (64, 128))
    assert len({parquet.fingerprint(each) for each in windows}) == 2


# ---- search ----------------------------------------------------------------------------------------------------------


def test_the_nearest_are_those_of_a_plain_comparison(texts, embedder, monkeypatch):
    monkeypatch.setattr("recur_gpt2.embedding.search.GROUP_ROWS", 4)
    for shard in ("1/2", "2/2"):
        assert embed("--shard", shard, output=f"e{shard[0]}.parquet") == 0
    Path("q.txt").write_text("Mr. Weston was away, and it rained " * 20)
    found = nearest([Path("e1.parquet"), Path("e2.parquet")], Path("q.txt"), 5, device="cpu")
    query = embedder.encode(Path("q.txt").read_text(), normalize=True)
    cosines = dict(zip(texts, embedder.encode(texts.values(), normalize=True) @ query, strict=True))
    expected = sorted(cosines, key=cosines.get, reverse=True)[:5]
    assert [each.id for each in found] == expected
    assert_allclose([each.cosine for each in found], [cosines[id] for id in expected], atol=1e-4)
    assert [each.characters for each in found] == [len(texts[id]) for id in expected]


def test_search_prints_what_it_finds(texts, capsys):
    embed()
    Path("q.txt").write_text(texts["docs/25.txt"])
    capsys.readouterr()
    assert main(["search", "e.parquet", "--query-file", "q.txt", "-k", "3", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[0] == "1"
    assert lines[1].split()[1] == "1.0000"
    assert lines[1].endswith("docs/25.txt")


def search_error(capsys, *flags):
    assert main(["search", *flags, "--device", "cpu"]) == 2
    return capsys.readouterr().err


def test_searches_that_cannot_be_made_are_refused(texts, embedder, capsys):
    embed()
    embed("--pooling", "last", output="last.parquet")
    Path("q.txt").write_text("a query")
    Path("none.txt").write_text(" ")
    query = ["--query-file", "q.txt"]
    embedder.model.save_pretrained("altered", tokenizer=embedder.tokenizer)
    with safe_open("altered/model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"transformer.ln_f.bias": tensors["transformer.ln_f.bias"] + 1}, "altered/model.safetensors")
    assert "pooling=last and e.parquet mean; search them" in search_error(capsys, "e.parquet", "last.parquet", *query)
    assert "is not the model that e.parquet was made with" in search_error(
        capsys, "e.parquet", *query, "--model", "altered"
    )
    assert "q2.txt does not exist; give a text file" in search_error(capsys, "e.parquet", "--query-file", "q2.txt")
    assert "none.txt is empty; write a text to it" in search_error(capsys, "e.parquet", "--query-file", "none.txt")
    assert "k=0 must be at least 1" in search_error(capsys, "e.parquet", *query, "-k", "0")
    assert "is no readable parquet file" in search_error(capsys, "missing.parquet", *query)


def test_without_faiss_it_says_what_to_install(texts, capsys, monkeypatch):
    embed()
    Path("q.txt").write_text("a query")
    monkeypatch.setattr("recur_gpt2.embedding.search.faiss", None)
    assert "pip install 'recur-gpt2[search]'" in search_error(capsys, "e.parquet", "--query-file", "q.txt")


def test_settings_are_in_the_file(texts):
    embed("--layer", "2")
    settings = json.loads(pq.read_schema("e.parquet").metadata[b"recur_gpt2"])
    assert settings["layer"] == 2
    assert settings["window"] == 256
    assert settings["model"] == str(BUNDLED_RECURRENT)
