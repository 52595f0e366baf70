"""What gets installed is one package, which needs no host; it can save attachments and has the command line."""

import ast
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

# Import names of packages that only the extras install.
HOSTS = [
    *("timm", "open_clip", "transformers", "torchvision", "huggingface_hub"),
    *("matplotlib", "skimage", "lmms_eval", "ray", "pyarrow", "vllm"),
]
# The package without crossget.integrations: paths in the wheel, and names of the modules.
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "crossget").glob("**/*.py")
    if "integrations" not in path.relative_to(ROOT).parts
)
MODULES = [name.removesuffix(".py").replace("/", ".") for name in FILES if "_triton" not in name]
DATA = ("crossget/py.typed", "crossget/demo/show.html")
ADAPTERS = sorted(path.name for path in (ROOT / "integrations").glob("*.py"))

IMPORT_ALL = "import crossget, importlib\n" + "\n".join(
    f"importlib.import_module('{name.removesuffix('.__init__')}')" for name in MODULES
)
# Saves and loads an attachment of a model that no host provides; prints the towers.
SAVE = """
import torch, crossget
blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
model = torch.nn.Sequential(blocks)

@crossget.register(torch.nn.Sequential)
def adapter(model):
    return [crossget.Tower("visual", blocks=list(model[0]), width=4, prefix=1, class_token=True)]

with crossget.attach(model, crossget.CrossGET(1)) as attached:
    attached.save("saved")
with crossget.load(model, "saved") as attached:
    print(list(attached.cross_tokens))
"""
FIND_HOSTS = f"import importlib.util as u\nprint([name for name in {HOSTS!r} if u.find_spec(name)])"

# Makes the hosts unimportable in a process, installed or not.
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HOSTS!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What the command prints; it has to succeed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout.strip()


def python(code: str, interpreter: str | Path = sys.executable, cwd: Path = ROOT) -> str:
    return run(interpreter, "-c", code, cwd=cwd)


def last_error(code: str, interpreter: str | Path = sys.executable, cwd: Path = ROOT) -> str:
    """The last line of the traceback; the code has to fail."""
    done = subprocess.run([str(interpreter), "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_importing_the_package_imports_no_host() -> None:
    # Imports of torch, fvcore and tyro themselves do not count.
    loaded = python(
        "import sys, torch, fvcore.nn, tyro\nbefore = set(sys.modules)\n"
        f"{IMPORT_ALL}\nprint(sorted(set(sys.modules) - before))"
    )
    assert {name.partition(".")[0] for name in ast.literal_eval(loaded)}.isdisjoint(HOSTS)


@pytest.mark.slow  # implied by the test above
def test_package_imports_where_the_hosts_are_blocked() -> None:
    python(BLOCKER + IMPORT_ALL)


@pytest.mark.parametrize("host", HOSTS)
def test_blocker_blocks(host: str) -> None:
    assert last_error(f"{BLOCKER}import {host}") == f"ModuleNotFoundError: blocked: {host}"


def test_adapters_have_one_name() -> None:
    # Under a second name the same file would register its backbones twice.
    assert "crossget.integrations" in last_error("import integrations")


# The rest builds and installs, which needs a package index for setuptools.


def build_tree(folder: Path, links: bool) -> Path:
    """A copy, so that setuptools leaves nothing in the checkout; git lays `links=False` where it cannot link."""
    adapters = [f"integrations/{name}" for name in ADAPTERS]
    for name in (
        "pyproject.toml",
        "MANIFEST.in",
        "build_backend.py",
        "README.md",
        "LICENSE",
        "NOTICE",
        *DATA,
        *FILES,
        *adapters,
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    link = folder / "crossget" / "integrations"
    if links:
        link.symlink_to("../integrations", target_is_directory=True)
    else:
        link.write_text("../integrations")
    return folder


def build_wheel(folder: Path, links: bool) -> Path:
    tree = build_tree(folder / "tree", links)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "dist", tree, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), links=True)


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_wheel_has_one_name_and_all_adapters(wheel: Path) -> None:
    files = {name for name in files_in(wheel) if ".dist-info/" not in name}
    assert {PurePosixPath(name).parts[0] for name in files} == {"crossget"}
    assert files == {*FILES, *DATA, *(f"crossget/integrations/{name}" for name in ADAPTERS)}


@pytest.mark.slow
def test_wheel_is_the_same_where_git_makes_no_links(wheel: Path, tmp_path: Path) -> None:
    assert files_in(build_wheel(tmp_path, links=False)) == files_in(wheel)


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("build")
    tree = build_tree(tmp_path / "tree", links=True)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", tree)  # the sdist, then the wheel from it
    (rebuilt,) = (tmp_path / "dist").glob("*.whl")
    assert files_in(rebuilt) == files_in(wheel)


def build_sdist(folder: Path, epoch: str) -> bytes:
    """Of the files that git knows; each of them with a time of its own, and of another owner's rights."""
    names = [name for name in run("git", "ls-files", "-z").split("\0") if name]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (folder / name).symlink_to((ROOT / name).readlink())
        else:
            (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "README.md").chmod(0o600)
    os.utime(folder / "README.md", (10**9, 10**9))
    code = f"import os\nos.environ['SOURCE_DATE_EPOCH'] = '{epoch}'\nimport build_backend\n"
    name = python(f"{code}print(build_backend.build_sdist('.'))", cwd=folder).splitlines()[-1]
    return (folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an sdist is built from a checkout")
def test_sdist_is_small_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = build_sdist(tmp_path / "first", "1700000000")
    with tarfile.open(fileobj=io.BytesIO(first)) as archive:
        names = {item.name.partition("/")[2] for item in archive}
        assert {item.mtime for item in archive} == {1700000000}
    assert len(first) < 1.2e6
    assert {"tests/test_packaging.py", "docs/quickstart.md", "experiments/run.py", "build_backend.py"} <= names
    assert "PKG-INFO" in names
    assert not [name for name in names if "/results" in name or ".egg-info" in name]
    assert not [name for name in names if name.endswith((".png", ".pyc", "results.csv"))]
    assert build_sdist(tmp_path / "second", "1700000000") == first
    assert build_sdist(tmp_path / "third", "1800000000") != first


def test_classifiers_begin_with_the_oldest_python_and_have_no_gap() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    minors = [int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)]
    assert f'requires-python = ">=3.{minors[0]}"' in text
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_saving_needs_nothing_but_what_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"safetensors>=' in text.partition("dependencies = [")[2].partition("]")[0]


def needed(requires: list[str]) -> set[str]:
    """The distributions that these requirements bring along here, themselves included."""
    todo = [(Requirement(line), "") for line in requires]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in {"", *requirement.extras}:
            if (requirement.name, wanted) not in seen:
                seen.add((requirement.name, wanted))
                todo += [(Requirement(line), wanted) for line in metadata.requires(requirement.name) or []]
    return {name for name, _ in seen}


def link_distributions(names: set[str], folder: Path) -> None:
    for distribution in map(metadata.distribution, names):
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            link = folder / top
            if not link.exists():  # several distributions share the namespace package `nvidia`
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel and what its metadata ask for.

    The environment and the installation of the wheel are real. Its requirements are links to the ones installed here,
    in place of a second download of several gigabytes; nothing else that is installed here can be seen from it.
    """
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", folder / "venv")
    interpreter = folder / "venv" / "bin" / "python"
    run(interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)

    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", interpreter, folder))
    (installed,) = metadata.distributions(name="crossget", path=[str(site)])
    (folder / "requirements").mkdir()
    link_distributions(needed(installed.requires or []), folder / "requirements")
    (site / "requirements.pth").write_text(f"{folder / 'requirements'}\n")
    return interpreter


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
class TestCleanEnvironment:
    def test_has_no_host(self, clean_python: Path, tmp_path: Path) -> None:
        assert python(FIND_HOSTS, clean_python, tmp_path) == "[]"
        assert {"timm", "open_clip", "transformers"} <= set(ast.literal_eval(python(FIND_HOSTS)))  # but here it has

    def test_imports_the_installed_package(self, clean_python: Path, tmp_path: Path) -> None:
        where = python(f"{IMPORT_ALL}\nprint(crossget.__file__)", clean_python, tmp_path)
        assert Path(where).is_relative_to(clean_python.parents[1])

    def test_has_no_second_name(self, clean_python: Path, tmp_path: Path) -> None:
        code = "import importlib.util as u\nprint([u.find_spec(n) for n in ('integrations', 'tests', 'experiments')])"
        assert python(code, clean_python, tmp_path) == "[None, None, None]"

    def test_says_what_it_cannot_reduce(self, clean_python: Path, tmp_path: Path) -> None:
        code = "import crossget, torch\ncrossget.attach(torch.nn.Linear(2, 2), crossget.CrossGET(1))"
        assert last_error(code, clean_python, tmp_path).startswith("TypeError")

    def test_saves_and_loads(self, clean_python: Path, tmp_path: Path) -> None:
        assert python(SAVE, clean_python, tmp_path) == "['visual']"

    def test_command_runs(self, clean_python: Path, tmp_path: Path) -> None:
        assert "usage" in run(clean_python.parent / "crossget", "--help", cwd=tmp_path).lower()
        assert "--rounds" in run(clean_python.parent / "crossget", "bench", "--help", cwd=tmp_path)
