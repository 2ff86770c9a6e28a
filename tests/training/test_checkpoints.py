"""checkpoints.py: whole or not at all, damaged ones refused, no pickle."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from helpers_training import assert_same_weights, small_run, tiny_model, weights_of

from recur_gpt2.data.batches import LanePosition
from recur_gpt2.errors import InputError
from recur_gpt2.models import state
from recur_gpt2.models.state import RecurState
from recur_gpt2.training import checkpoints
from recur_gpt2.training.checkpoints import KEPT, Checkpoint
from recur_gpt2.training.distributed import Processes

FILES = {
    "model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.safetensors",
    "run.json",
}
files = pytest.mark.parametrize("file", sorted(FILES))


@pytest.fixture
def trained(tmp_path):
    """A run of six steps, saved at each."""
    trainer = small_run(tiny_model(), tmp_path, save_every=1)
    trainer.run()
    return trainer


def parts():
    """What a checkpoint is made from: a model and an optimizer that has taken a step."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.arange(1, 21)[None]).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    return model, optimizer


def checkpoints_in(folder, settings):
    """Those of one process."""
    return checkpoints.Checkpoints(folder, settings, Processes("cpu"))


def checkpoint_of(step):
    return Checkpoint(step, 10 * step, "float32", [{"step": step}], LanePosition([0], [0], 1), RecurState.empty(1))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what is written -------------------------------------------------------------------------------------------------


def test_only_the_newest_two_checkpoints_are_kept(trained):
    assert KEPT == 2
    assert names(trained.checkpoints.folder) == ["step-00000005", "step-00000006"]


def test_a_checkpoint_holds_no_pickle(trained):
    for checkpoint in trained.checkpoints.folder.iterdir():
        assert set(names(checkpoint)) == FILES
    for path in trained.folder.rglob("*"):
        assert path.suffix not in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"}
        if path.is_file():
            assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")), path


def test_everything_comes_back_as_it_was_saved(tmp_path):
    model, optimizer = parts()
    saved = checkpoints_in(tmp_path, {"window": 8, "layers": (0, 1)})
    torch.manual_seed(5)
    memory = {"0": torch.randn(3, 2, 4, 3, 8)}
    counters = torch.tensor([2, 0, 1])
    checkpoint = checkpoint_of(7)
    checkpoint.state = RecurState(counters, counters * 0, memory)
    checkpoint.position = LanePosition([4, 2, -1], [0, 7, 0], 5)
    saved.save(model, optimizer, checkpoint)
    drawn = torch.rand(4)

    other, _ = parts()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-3)
    loaded = checkpoints_in(tmp_path, {"window": 8, "layers": [0, 1]}).load(other, fresh, torch.device("cpu"))
    assert_same_weights(model, other)
    assert other.lm_head.weight is other.transformer.wte.weight, "tied weights stay tied"
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            restored = fresh.state_dict()["state"][index][key]
            assert torch.equal(restored, value)
            assert restored.dtype == value.dtype
    assert torch.equal(torch.rand(4), drawn), "randomness goes on where it stood"
    assert (loaded.step, loaded.tokens, loaded.history) == (7, 70, [{"step": 7}])
    assert loaded.position == checkpoint.position
    assert torch.equal(loaded.state.windows, counters)
    assert torch.equal(loaded.state.memory["0"], memory["0"])


def test_there_is_nothing_to_load_in_an_empty_folder(tmp_path):
    model, optimizer = parts()
    saved = checkpoints_in(tmp_path / "missing", {})
    assert saved.latest() is None
    assert saved.load(model, optimizer, "cpu") is None


def test_a_checkpoint_can_be_written_again(tmp_path):
    saved = checkpoints_in(tmp_path, {})
    for tokens in (1, 2):
        checkpoint = checkpoint_of(3)
        checkpoint.tokens = tokens
        saved.save(*parts(), checkpoint)
    assert names(tmp_path) == ["step-00000003"]
    assert saved.load(*parts(), "cpu").tokens == 2


def test_an_unfinished_folder_is_no_checkpoint_and_is_cleared_by_the_next_one(tmp_path):
    saved = checkpoints_in(tmp_path, {})
    saved.save(*parts(), checkpoint_of(1))
    unfinished = tmp_path / ".step-00000002.0123abcd.unfinished"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert saved.latest().name == "step-00000001"
    saved.save(*parts(), checkpoint_of(3))
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


# ---- a disk that is full ---------------------------------------------------------------------------------------------


def fill_disk_at(monkeypatch, file):
    """No space is left once the named file is to be written."""

    def failing(save_file):
        def save(tensors, path, **options):
            if path.name.removeprefix(".").partition(".")[0] == file.partition(".")[0]:  # or while it is unfinished
                path.write_bytes(b"half a file")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save_file(tensors, path, **options)

        return save

    monkeypatch.setattr(checkpoints, "save_file", failing(checkpoints.save_file))
    monkeypatch.setattr(state, "save_file", failing(state.save_file))
    if file == "run.json":

        def no_space(path, *args, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoints.Path, "write_text", no_space)


@files
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_unfinished(file, tmp_path, monkeypatch):
    """At each of the files; and once there is room, the run goes on to the same end."""
    whole = small_run(tiny_model(), tmp_path / "whole")
    whole.run()
    trainer = small_run(tiny_model(), tmp_path / "full")
    with monkeypatch.context() as full:
        whole_step = trainer._step

        def step_on_full_disk(*args):
            if len(trainer.history) == 2:
                fill_disk_at(full, file)
            return whole_step(*args)

        trainer._step = step_on_full_disk
        with pytest.raises(InputError) as refused:
            trainer.run()
    message = str(refused.value)
    assert message.startswith("the checkpoint of step 4 could not be written to ")
    assert "No space left on device" in message
    assert message.endswith("the last whole one is step-00000002; make room, then --resume")
    assert "\n" not in message
    assert names(trainer.checkpoints.folder) == ["step-00000002"]
    resumed = small_run(tiny_model(), tmp_path / "full")
    resumed.run(resume=True)
    assert_same_weights(resumed.model, whole.model)


def test_a_limit_of_the_system_is_met_in_one_sentence(tmp_path):
    """Not a stand-in: the system itself refuses to write large files, after a few small ones."""
    saved = checkpoints_in(tmp_path, {})
    saved.save(*parts(), checkpoint_of(1))
    model, optimizer = parts()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(InputError, match=r"step 2 could not be written to .* the last whole one is step-00000001"):
            saved.save(model, optimizer, checkpoint_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none(tmp_path, monkeypatch):
    fill_disk_at(monkeypatch, "model.safetensors")
    with pytest.raises(InputError, match=r"step 1 could not be written .*there is none yet; make room"):
        checkpoints_in(tmp_path, {}).save(*parts(), checkpoint_of(1))
    assert names(tmp_path) == []


# ---- damage ----------------------------------------------------------------------------------------------------------


@files
@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(file, damage, tmp_path):
    saved = checkpoints_in(tmp_path, {})
    for step in (1, 2):
        saved.save(*parts(), checkpoint_of(step))
    path = saved.latest() / file
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 8)
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "overwritten":
        path.write_bytes(bytes(range(256)) * 4)
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"step-00000002 is damaged .*; delete it to go on") as error:
        saved.load(*parts(), "cpu")
    assert "\n" not in str(error.value)
    shutil.rmtree(saved.latest())
    assert saved.load(*parts(), "cpu").step == 1


def test_a_damaged_checkpoint_changes_nothing(tmp_path):
    saved = checkpoints_in(tmp_path, {})
    saved.save(*parts(), checkpoint_of(1))
    os.truncate(saved.latest() / "state.safetensors", 20)
    model, optimizer = parts()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = weights_of(model)
    with pytest.raises(InputError):
        saved.load(model, optimizer, "cpu")
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_settings_are_compared_and_the_differing_one_named(tmp_path):
    checkpoints_in(tmp_path / "run" / "checkpoints", {"lanes": 3, "layers": [0, 1]}).save(*parts(), checkpoint_of(1))
    checkpoints_in(tmp_path / "run" / "checkpoints", {"lanes": 3, "layers": (0, 1)}).load(*parts(), "cpu")
    for other, named in (
        ({"lanes": 4, "layers": [0, 1]}, "lanes=3, not 4"),
        ({"lanes": 3, "layers": [1]}, r"layers=\[0, 1\], not \[1\]"),
        ({"lanes": 3, "layers": [0, 1], "new": 1}, "new=None, not 1"),
    ):
        with pytest.raises(InputError, match=f"{named}; resume with its settings or give another --output-dir"):
            checkpoints_in(tmp_path / "run" / "checkpoints", other).load(*parts(), "cpu")


def test_run_json_is_plain_json(trained):
    meta = json.loads((trained.checkpoints.latest() / "run.json").read_text(encoding="utf-8"))
    assert meta["settings"]["lanes"] == 3
    assert meta["run"]["step"] == 6
    assert len(meta["run"]["history"]) == 6
