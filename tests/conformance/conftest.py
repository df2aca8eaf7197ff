"""Holds the run to `skips.toml`: what it declares is skipped, and a skip that it doesn't name fails the run."""

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto

from viscpm_hf.families.family import FAMILIES


DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
SKIPS = tomllib.loads((Path(__file__).parent / "skips.toml").read_text("utf-8"))
DECLARED = {(entry["class"], entry["test"]): entry["reason"] for entry in SKIPS["declared"]}
KNOWN = [re.compile(entry["reason"]) for entry in SKIPS["environment"] + SKIPS["inapplicable"]]

# By this table the suite knows which models have no loss.
for family in FAMILIES.values():
    if family.shares_model_type:
        continue  # without a model that has no head, which the suite would take this table to name
    modeling_auto.MODEL_MAPPING_NAMES[family.config_class.model_type] = family.base_class.__name__


def table_rows() -> list[str]:
    """The rows that docs/conformance.md has to have."""
    cells = [(entry["reason"], entry["why"]) for entry in SKIPS["environment"] + SKIPS["inapplicable"]]
    cells += [(f"{entry['class']}.{entry['test']}", entry["reason"]) for entry in SKIPS["declared"]]
    return ["| `{}` | {} |".format(first.replace("|", "\\|").replace("`", "'"), second) for first, second in cells]


def pytest_collection_modifyitems(items):
    classes = {item.cls.__name__: item.cls for item in items}
    for name, test in DECLARED:
        if name in classes and not hasattr(classes[name], test):
            raise pytest.UsageError(f"skips.toml: {name} has no {test}.")
    for item in items:
        reason = DECLARED.get((item.cls.__name__, item.name))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


class Ledger:
    """Counts outcomes by class, and gathers the skips that nobody has named."""

    def __init__(self):
        self.outcomes: dict[str, str] = {}
        self.unnamed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "xfail"
            if reason not in DECLARED.values() and not any(entry.fullmatch(reason) for entry in KNOWN):
                self.unnamed[report.nodeid] = reason
        # A test of several parts counts once, as its worst one.
        order = ["passed", "skipped", "failed"]
        if report.when == "call" or not report.passed:
            self.outcomes[report.nodeid] = max(
                self.outcomes.get(report.nodeid, "passed"), report.outcome, key=order.index
            )

    def pytest_sessionfinish(self, session):
        if self.unnamed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        counts: dict[str, Counter] = {}
        for test, outcome in self.outcomes.items():
            counts.setdefault(test.split("::")[1], Counter())[outcome] += 1
        terminalreporter.section("tests by class")
        for name, count in sorted(counts.items()):
            terminalreporter.write_line(f"{name}: " + ", ".join(f"{count[key]} {key}" for key in sorted(count)))
        if self.unnamed:
            terminalreporter.section("skips that tests/conformance/skips.toml does not name", red=True)
            for test, reason in self.unnamed.items():
                terminalreporter.write_line(f"{test}: {reason}")


def pytest_configure(config):
    document = DOCUMENT.read_text("utf-8").splitlines()
    missing = [row for row in table_rows() if row not in document]
    if missing:
        raise pytest.UsageError("docs/conformance.md lacks what skips.toml says:\n" + "\n".join(missing))
    if not hasattr(config, "workerinput"):  # with pytest-xdist: the process that hears of all tests
        config.pluginmanager.register(Ledger())
