"""The test files that a change selects."""

import subprocess
import sys
from pathlib import Path

import pytest
from tools import changed
from tools.changed import ROOT, ImportGraph, changed_since, select

SOURCES = {
    "pyproject.toml": "",
    "docs/page.md": "",
    "slurm/job.sh": "",
    "kandinsky_dist/__init__.py": "",
    "kandinsky_dist/__main__.py": "from kandinsky_dist.cli import main",
    "kandinsky_dist/cli.py": "def main():\n    from kandinsky_dist.train import trainer",
    "kandinsky_dist/config/__init__.py": "",
    "kandinsky_dist/config/loader.py": "",
    "kandinsky_dist/data/__init__.py": "",
    "kandinsky_dist/data/plan.py": "",
    "kandinsky_dist/data/order.py": "from .plan import Plan",
    "kandinsky_dist/models/__init__.py": "",
    "kandinsky_dist/models/init.py": "",
    "kandinsky_dist/recipes/tiny_run.yaml": "",
    "kandinsky_dist/train/__init__.py": "",
    "kandinsky_dist/train/trainer.py": "from kandinsky_dist.data import order",
    "tests/conftest.py": (
        "import pytest\n@pytest.fixture\ndef folder(networks): ...\n"
        "@pytest.fixture\ndef networks():\n    from kandinsky_dist.models.init import initialise"
    ),
    "tests/helpers/command.py": 'STARTED = ["-m", "kandinsky_dist"]',
    "tests/unit/conftest.py": "import pytest\n@pytest.fixture(autouse=True)\ndef _quiet(): ...",
    "tests/unit/data/test_plan.py": "from kandinsky_dist.data.plan import Plan",
    "tests/unit/data/test_order.py": "def test_order():\n    import kandinsky_dist.data.order",
    "tests/unit/data/made.py": "import kandinsky_dist.config.loader",
    "tests/unit/data/test_made.py": "import made",
    "tests/unit/models/test_patched.py": 'PATCHED = "kandinsky_dist.models.init.SIZE"',
    "tests/unit/models/test_fixture.py": "def test_folder(folder): ...",
    "tests/unit/test_docs.py": 'PAGE = "docs/page.md"',
    "tests/unit/test_files.py": "import kandinsky_dist",
    "tests/dist/programs.py": "from kandinsky_dist.data import plan",
    "tests/dist/test_train.py": "import pytest\nfrom dist.programs import f\npytestmark = pytest.mark.dist",
    "tests/dist/test_command.py": "from helpers import command\nimport pytest\npytestmark = pytest.mark.dist",
    "tests/slurm/jobs.py": 'SCRIPT = "slurm/job.sh"',
    "tests/slurm/test_jobs.py": "import pytest, jobs\npytestmark = [pytest.mark.slurm]",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, source in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def selected(root: Path, *paths: str) -> list[str]:
    graph = ImportGraph(root, [path for path in paths if not (root / path).exists()])
    return [one.path.removeprefix("tests/") for one in select(graph, paths)]


@pytest.mark.parametrize(
    ("path", "tests"),
    [
        # Distances 1, 2, 2, 5 (the command line), and the test that looks at all files of the package.
        (
            "kandinsky_dist/data/plan.py",
            [
                "unit/data/test_plan.py",
                "unit/data/test_order.py",
                "dist/test_train.py",
                "dist/test_command.py",
                "unit/test_files.py",
            ],
        ),
        (
            "kandinsky_dist/models/init.py",
            ["unit/models/test_patched.py", "unit/models/test_fixture.py", "unit/test_files.py"],
        ),
        ("kandinsky_dist/recipes/tiny_run.yaml", ["unit/data/test_made.py", "unit/test_files.py"]),
        ("tests/unit/data/test_order.py", ["unit/data/test_order.py"]),
        ("tests/dist/programs.py", ["dist/test_train.py"]),
        ("slurm/job.sh", ["slurm/test_jobs.py"]),
        ("docs/page.md", ["unit/test_docs.py"]),
        ("docs/other.md", ["unit/test_docs.py"]),
        ("LICENSE", []),
    ],
)
def test_a_change_selects_the_tests_that_reach_it_nearest_first(checkout, path, tests):
    assert selected(checkout, path) == tests


@pytest.mark.parametrize("path", ["pyproject.toml", "launch/test.sh", "tests/conftest.py"])
def test_some_files_select_every_test(checkout, path):
    tests = {name.removeprefix("tests/") for name in SOURCES if Path(name).name.startswith("test_")}
    assert set(selected(checkout, path)) == tests


def test_a_folders_conftest_selects_the_tests_below_it(checkout):
    assert all(test.startswith("unit/") for test in selected(checkout, "tests/unit/conftest.py"))
    assert "unit/data/test_plan.py" in selected(checkout, "tests/unit/conftest.py")


def test_a_deleted_module_selects_its_importers(checkout):
    (checkout / "kandinsky_dist/data/plan.py").unlink()
    assert selected(checkout, "kandinsky_dist/data/plan.py")[0] == "unit/data/test_plan.py"


def test_a_change_is_what_git_says_and_untracked_files(checkout):
    def git(*words):
        subprocess.run(["git", "-C", str(checkout), *words], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    (checkout / "kandinsky_dist/data/plan.py").write_text("Plan = 1")
    (checkout / "docs/page.md").unlink()
    (checkout / "tests/unit/test_new.py").write_text("")
    expected = ["docs/page.md", "kandinsky_dist/data/plan.py", "tests/unit/test_new.py"]
    assert changed_since(checkout, "HEAD") == expected
    done = subprocess.run(
        [sys.executable, changed.__file__, "--root", str(checkout), "--tier", "process"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["tests/dist/test_train.py", "tests/dist/test_command.py"]
    with pytest.raises(SystemExit, match=r"git diff failed: .*no-such-commit"):
        changed_since(checkout, "no-such-commit")


@pytest.fixture(scope="module")
def graph() -> ImportGraph:
    return ImportGraph(ROOT)


def test_here_a_plan_is_tested_by_its_own_tests_first_and_by_training(graph):
    found = select(graph, ["kandinsky_dist/data/plan.py"])
    assert found[0].path == "tests/unit/data/test_plan.py"
    tiers = {one.path: one.tier for one in found}
    assert tiers["tests/dist/test_parity.py"] == "process"
    assert tiers["tests/slurm/test_sbatch.py"] == "slurm"


def test_here_the_text_of_status_is_not_tested_by_the_plans_tests(graph):
    tests = {one.path for one in select(graph, ["kandinsky_dist/status/text.py"])}
    assert "tests/unit/status/test_status.py" in tests
    assert "tests/unit/data/test_plan.py" not in tests


def test_here_every_module_of_the_package_is_reached_by_a_test(graph):
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "kandinsky_dist").rglob("*.py")]
    assert [module for module in modules if not select(graph, [module])] == []


def test_here_a_job_script_is_tested_on_a_cluster_and_without(graph):
    tests = {one.path for one in select(graph, ["slurm/pipeline.sh"])}
    assert {"tests/unit/submit/test_pipeline.py", "tests/slurm/test_sbatch.py"} <= tests
