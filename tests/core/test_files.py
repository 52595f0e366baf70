"""Files are written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crossget.core import files

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def half_written(context: Any, error: BaseException) -> None:
    with context as part:
        (part / "config" if part.is_dir() else part).write_text("half of")
        raise error


def test_a_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    files.write_text(target, "one")
    target.chmod(0o640)
    files.write_text(target, "two")
    assert contents(tmp_path) == {"new/page.html": "two"}
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("one")
    (tmp_path / "link").symlink_to("there")
    files.write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "two"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path(os.devnull)):
        with pytest.raises(ValueError, match=f"{path} is not a regular file"):
            files.write_text(path, "two")


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "page.html").write_text("one")
    with pytest.raises(type(error)):
        half_written(files.replacing(tmp_path / "page.html"), error)
    assert contents(tmp_path) == {"page.html": "one"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An old folder with two files of its own and a stranger's."""
    old = tmp_path / "out"
    (old / "deep").mkdir(parents=True)
    for name in ("config", "shard", "notes", "deep/notes"):
        (old / name).write_text("old")
    (old / "link").symlink_to("notes")
    return old


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_exchanged(folder: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(files.sys, "platform", "elsewhere")
    with files.replacing_folder(folder, drop={"config", "shard"}) as part:
        (part / "config").write_text("new")
    assert contents(folder.parent) == {
        "out/config": "new", "out/notes": "old", "out/link": "old", "out/deep/notes": "old",
    }  # fmt: skip
    assert (folder / "link").readlink() == Path("notes")


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_folder_that_is_not_finished_stays_the_old_one(folder: Path, error: BaseException) -> None:
    before = contents(folder.parent)
    with pytest.raises(type(error)):
        half_written(files.replacing_folder(folder, drop={"shard"}), error)
    assert contents(folder.parent) == before


def test_a_folder_that_cannot_be_exchanged_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it takes two renames, and the second one fails."""
    before, rename = contents(folder.parent), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == folder and not (self / "config").exists():
            raise OSError("full")
        return rename(self, target)

    monkeypatch.setattr(files.sys, "platform", "elsewhere")
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="full"), files.replacing_folder(folder, drop={"config"}):
        pass
    assert contents(folder.parent) == before


def test_a_folder_with_a_mount_point_inside_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder.parent)
    monkeypatch.setattr(files.os.path, "ismount", lambda path: Path(path).name == "deep")
    with pytest.raises(ValueError, match="has mount points inside"), files.replacing_folder(folder):
        pass
    assert contents(folder.parent) == before


def test_a_new_folder(tmp_path: Path) -> None:
    with files.replacing_folder(tmp_path / "a" / "out") as part:
        (part / "config").write_text("new")
    assert contents(tmp_path) == {"a/out/config": "new"}
    with pytest.raises(ValueError, match="is not a folder"), files.replacing_folder(tmp_path / "a/out/config"):
        pass
    with pytest.raises(ValueError, match="a mount point"), files.replacing_folder("/"):
        pass


@pytest.mark.parametrize("what", ["replacing", "replacing_folder"])
def test_a_killed_process_leaves_the_old_content(folder: Path, what: str) -> None:
    target = folder if what == "replacing_folder" else folder / "config"
    code = (
        "import os, signal, sys\nfrom crossget.core import files\n"
        f"with files.{what}(sys.argv[1]) as part:\n"
        "    (part / 'config' if part.is_dir() else part).write_text('half of')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "config").read_text() == "old"
    left = [path for path in [*folder.iterdir(), *folder.parent.iterdir()] if path.name.startswith(".")]
    assert [path.name.endswith(".part") for path in left] == [True]
    others = [left[0].with_name(name) for name in (
        left[0].name.replace(left[0].name.split(".")[-3], str(os.getpid())),  # of a process that runs
        left[0].name.replace(left[0].name.split(".")[-4], "0123abcd"),  # of another machine
        f".{target.name}.part", left[0].name + "s", left[0].name.replace(".part", ".old"),
    )]  # fmt: skip
    for other in others:
        other.write_text("theirs")
    if target == folder:
        with files.replacing_folder(target, drop={"config"}) as part:
            (part / "config").write_text("new")
    else:
        files.write_text(target, "new")
    assert (folder / "config").read_text() == "new"
    assert not left[0].exists(), "the next one that writes there removes it"
    assert all(other.read_text() == "theirs" for other in others)
