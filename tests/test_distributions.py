"""What users install is complete: the source distribution is the repository, the wheel its package."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_nexus import __version__
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "site", "shared"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without what git ignores, and without hidden files."""
    folder = tmp_path_factory.mktemp("distributions") / "source"
    shutil.copytree(REPOSITORY, folder, ignore=NOT_SOURCE)
    return folder


@pytest.fixture(scope="module")
def files(source: Path) -> set[str]:
    return {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(source: Path, files: set[str]) -> tuple[set[str], set[str], str]:
    """The files of the source distribution and of the wheel built from it, and the wheel's metadata."""
    out = source.with_name("dist")
    # From another folder: a folder `build` here would hide the module.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    name = f"megatron_nexus-{__version__}"
    with tarfile.open(out / f"{name}.tar.gz") as archive:
        sdist = {member.name.removeprefix(f"{name}/") for member in archive if member.isfile()}
    with zipfile.ZipFile(out / f"{name}-py3-none-any.whl") as archive:
        metadata = archive.read(f"{name}.dist-info/METADATA").decode()
        return sdist, set(archive.namelist()), metadata


def test_the_source_distribution_is_the_repository(built: tuple[set[str], ...], files: set[str]) -> None:
    made = {"PKG-INFO", "setup.cfg"}
    assert {file for file in built[0] if ".egg-info/" not in file} - made == files
    assert {
        "CHANGELOG.md",
        "docs/paper_numbers.md",
        "tests/run",
        "examples/configs/nexusformer-240m.yaml",
    } <= files


def test_the_wheel_is_the_package(built: tuple[set[str], ...], files: set[str]) -> None:
    made = {file.split("/", 1)[1] for file in built[1] if ".dist-info/" in file}
    assert {file for file in built[1] if ".dist-info/" not in file} == {
        file for file in files if file.startswith("megatron_nexus/")
    }
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} <= made


def test_the_metadata_says_what_it_is(built: tuple[set[str], ...]) -> None:
    metadata = email.message_from_string(built[2])
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == PROJECT["optional-dependencies"].keys()
    assert "Operating System :: POSIX :: Linux" in metadata.get_all("Classifier")
    assert metadata.get_payload().startswith("# megatron_nexus")


def test_the_changelog_has_this_version_and_its_date_below_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.*)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(
        re.escape(__version__) + r" \(\d{4}-\d\d-\d\d\)", headings[headings[0] == "Unreleased"]
    )


def needed_by(names: list[str]) -> set[str]:
    """The distributions that these need on this machine, themselves included."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found.add(name)
        try:
            wanted = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        names += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_the_tested_set_holds_what_the_package_needs_and_nothing_else() -> None:
    pinned = re.findall(r"^([\w.-]+)==", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
    wanted = needed_by([Requirement(line).name for line in PROJECT["dependencies"]])
    wanted = {name for name in wanted if not name.startswith(("nvidia-", "cuda-", "triton"))}  # CUDA's torch
    assert {canonicalize_name(name) for name in pinned} == wanted
