"""Tests of what the series trusts: pinned packages with hashes, a workflow with few rights, weights with a checksum."""

import hashlib
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import quantlib as ql

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
COMMAND = "pip install -r requirements.txt && pytest"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())


def pinned():
    """Name -> version, of requirements.txt."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def locked():
    """Name -> list of (requirement, hashes), of requirements.lock; a name may come more than once, with markers."""
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    result = {}
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        text, *hashes = line.split("--hash=")
        requirement = Requirement(text.strip())
        result.setdefault(canonicalize_name(requirement.name), []).append((requirement, [h.strip() for h in hashes]))
    return result


def test_every_pin_is_locked():
    """With the same version, everywhere."""
    packages = locked()
    for name, number in pinned().items():
        ((requirement, _),) = packages[canonicalize_name(name)]
        assert str(requirement.specifier) == f"=={number}" and not requirement.marker, name


def test_every_locked_package_has_hashes():
    """SHA-256 only; one version for each, and nothing that would fetch from another place."""
    packages = locked()
    assert len(packages) > 100 and sum(map(len, packages.values())) == len(re.findall(r"^[a-z]", LOCK, re.M))
    for requirement, hashes in (entry for entries in packages.values() for entry in entries):
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)) and not requirement.url, requirement
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), requirement
    assert "://" not in LOCK and not re.search(r"^\s*-(?!-hash=)", LOCK, re.M)


def test_the_lock_is_complete():
    """All that the pinned packages need here, they or what they need in turn, is locked."""
    packages, left, seen = locked(), [canonicalize_name(name) for name in pinned()], set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        assert name in packages, f"{name} is needed and not in requirements.lock"
        try:
            same = version(name).split("+")[0] in {str(r.specifier).removeprefix("==") for r, _ in packages[name]}
        except PackageNotFoundError:  # CUDA's libraries, where this torch was built without
            continue
        if not same:  # tests/versions.py runs this with others, which need other packages
            continue
        needed = [Requirement(text) for text in requires(name) or []]
        left += [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert len(seen) >= len(pinned())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_few_rights(path):
    """They read the repository and nothing else; actions are named by commit, which nobody can move."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) <= {"push", "pull_request", "schedule"}  # `on`, which YAML takes for a truth value
    assert "secrets." not in path.read_text() and "github.event" not in path.read_text()
    for job in workflow["jobs"].values():
        assert "permissions" not in job and job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_the_workflow_runs_the_command_of_the_readme():
    (path,) = WORKFLOWS
    steps = [step.get("run") for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
    assert COMMAND in steps and COMMAND in (ROOT / "README.md").read_text().splitlines()


def test_the_checksum_of_the_weights():
    """That of the file is that of the model card."""
    checksum = hashlib.sha256((ql.BUNDLED_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    (stated,) = re.findall(
        r"SHA-256 of `model.safetensors` \| `([0-9a-f]{64})`", (ql.BUNDLED_FOLDER / "README.md").read_text()
    )
    assert stated == checksum


def test_only_known_kinds_of_files_come_with_the_model():
    """No pickle, and no code but the recipe, which nothing imports."""
    kinds = {path.suffix for path in ql.BUNDLED_FOLDER.iterdir()}
    assert kinds <= {".json", ".safetensors", ".md", ".txt", ".py"}
    assert [path.name for path in ql.BUNDLED_FOLDER.glob("*.py")] == ["train.py"]
