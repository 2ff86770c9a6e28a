import pytest

from recur_gpt2.utils.files import atomic_path, atomic_write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_half(path, error):
    with atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error


def test_text_is_written_as_utf8_with_unix_line_ends(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "naïve\nœuvre\n")
    assert (tmp_path / "a.txt").read_bytes() == "naïve\nœuvre\n".encode()
    assert names(tmp_path) == ["a.txt"]


def test_a_new_file_replaces_the_old_one_only_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_midway_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failure_before_anything_is_written_is_not_masked(tmp_path):
    with pytest.raises(RuntimeError, match="the cause"), atomic_path(tmp_path / "a.txt"):
        raise RuntimeError("the cause")
    assert names(tmp_path) == []


def test_the_temporary_file_lies_beside_the_target_and_keeps_its_suffix(tmp_path):
    with atomic_path(str(tmp_path / "picture.png")) as temporary:
        temporary.touch()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"


def test_the_file_gets_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    atomic_write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
