"""Which source a row names: the package's own commit, and never that of a project around it."""

import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from vitbench import __version__
from vitbench.rows.runs import commit, commit_of

VERSION = f"version {__version__}"


def git(folder, *words):
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", folder, *named, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A small checkout of this project: its pyproject.toml and one file of the package, committed."""
    return project(tmp_path / "checkout", "vitbench", "vitbench")


def project(folder, name, package):
    """A repository of a project called `name` that tracks a package; returns the package."""
    (folder / package).mkdir(parents=True)
    text = (ROOT / "pyproject.toml").read_text().replace('name = "vitbench"', f'name = "{name}"')
    (folder / "pyproject.toml").write_text(text)
    shutil.copy(ROOT / "vitbench" / "__init__.py", folder / package)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all")
    return folder / package


def test_this_package_is_looked_for_in_its_own_folder():
    assert commit() == commit_of(ROOT / "vitbench")


def test_a_checkout_has_its_commit(checkout):
    assert commit_of(checkout) == git(checkout.parent, "rev-parse", "--short=12", "HEAD")


@pytest.mark.parametrize("change", ["a file changed", "a method added"])
def test_a_changed_checkout_is_dirty(checkout, change):
    file = checkout / ("__init__.py" if change == "a file changed" else "methods.py")
    file.write_text("# changed\n")
    assert commit_of(checkout) == git(checkout.parent, "rev-parse", "--short=12", "HEAD") + "-dirty"


def test_notes_beside_the_package_do_not_make_it_dirty(checkout):
    (checkout.parent / "notes.txt").write_text("mine")
    assert not commit_of(checkout).endswith("-dirty")


@pytest.mark.parametrize("place", ["vitbench", ".venv/lib/site-packages/vitbench"])
@pytest.mark.parametrize("tracked", [True, False])
def test_a_copy_in_another_project_has_its_version(tmp_path, place, tracked):
    """Also where that project tracks the copy, and where it lies beside that project's own pyproject.toml."""
    own = project(tmp_path / "own", "mine", "code").parent
    copy = own / place
    copy.mkdir(parents=True)
    shutil.copy(ROOT / "vitbench" / "__init__.py", copy)
    if tracked:
        git(own, "add", "-f", ".")
        git(own, "commit", "-qm", "copied")
    assert commit_of(copy) == VERSION


def test_sources_without_git_have_their_version(tmp_path, monkeypatch, checkout):
    shutil.copytree(checkout, tmp_path / "unpacked" / "vitbench")
    assert commit_of(tmp_path / "unpacked" / "vitbench") == VERSION
    monkeypatch.setenv("PATH", "")
    assert commit_of(checkout) == VERSION, "a checkout where git is not installed"


def test_what_the_shell_says_of_git_does_not_count(tmp_path, monkeypatch, checkout):
    other = project(tmp_path / "own", "mine", "code").parent
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    found = commit_of(checkout)
    monkeypatch.delenv("GIT_DIR")
    assert found == git(checkout.parent, "rev-parse", "--short=12", "HEAD")
