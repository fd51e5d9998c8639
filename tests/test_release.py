"""A release tests the versions of Python and torch that the packages name, by commands that a developer has too."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_a_release_tests_the_versions_that_the_package_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert f">={matrix['python'][0]}" == project["requires-python"]
    torch = next(name for name in project["dependencies"] if name.startswith("torch"))
    first, ceiling = re.findall(r"\d+\.(\d+)", torch)
    assert [int(version.split(".")[1]) for version in matrix["torch"]] == [int(first), int(ceiling) - 1]
    built = re.findall(r"cp3(\d+)-", jobs["castlm"]["steps"][1]["env"]["CIBW_BUILD"])
    assert [f"3.{minor}" for minor in built] == matrix["python"]


def test_a_release_runs_the_commands_of_the_repository():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands:
        if found := re.fullmatch(r"make (\S+)", command):
            assert found[1] in targets
        else:
            assert command.startswith("echo ") or command.endswith(" .ci/run"), command
    assert set(jobs) - {"publish"} == set(jobs["publish"]["needs"])


def test_the_install_page_lists_every_extra_of_a_user():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(extras) - {"docs", "dev"}
