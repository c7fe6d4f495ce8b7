"""Where runs come from: lineage as a tree, differences of their configurations, commands."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from megatron_nexus.base.invocation import command
from megatron_nexus.config.command_line import build
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.run_config import SECTIONS, RunConfig
from megatron_nexus.reports.family import parent_of
from megatron_nexus.reports.html_parts import code, details, paragraph, section, table
from megatron_nexus.reports.recorded_run import RecordedRun


def lineage_section(runs: Sequence[RecordedRun]) -> str:
    """Return the tree of runs; parents that were not given stand in it by their folders."""
    children: dict[str, list[RecordedRun]] = {}
    for run in runs:
        growth = run.growths[-1] if run.growths else None
        parent = parent_of(run, growth, runs) if growth else None
        key = parent.name if parent else str(growth.parent_run) if growth else ""
        children.setdefault(key, []).append(run)

    def item(key: str, label: str) -> str:
        inner = "".join(item(run.name, _label(run)) for run in children.get(key, []))
        return f"<li>{label}{f'<ul>{inner}</ul>' if inner else ''}</li>"

    roots = [item(run.name, _label(run)) for run in children.get("", [])]
    absent = children.keys() - {"", *(run.name for run in runs)}
    roots += [item(path, f"{escape(path)} (not given)") for path in children if path in absent]
    return section("Lineage", f'<ul class="tree">{"".join(roots)}</ul>')


def _label(run: RecordedRun) -> str:
    growth = run.growths[-1] if run.growths else None
    size = f", {run.parameters:,} parameters" if run.parameters else ""
    how = f", grown at step {growth.step:,}: {growth}" if growth else ""
    return f"<strong>{escape(run.name)}</strong>{escape(size + how)}"


def differences_section(runs: Sequence[RecordedRun]) -> str:
    """Return the settings in which runs differ; of a single one, those that are not the defaults."""
    known = [(run.name, _settings(run.config)) for run in runs if run.config]
    if not known:
        return ""
    if len(known) == 1:
        (name, settings), defaults = known[0], _settings(build({}))
        rows = [[key, value, defaults[key]] for key, value in settings.items() if value != defaults[key]]
        return section(
            "Configuration", details("what is not the default", table(("", name, "default"), rows))
        )
    keys = list(dict.fromkeys(key for _, settings in known for key in settings))
    values = {key: [settings.get(key, "") for _, settings in known] for key in keys}
    rows = [[key, *row] for key, row in values.items() if len(set(row)) > 1]
    if not rows:
        return section("Configuration differences", paragraph("All runs have the same configuration."))
    return section("Configuration differences", table(("", *(name for name, _ in known)), rows))


def _settings(config: RunConfig) -> Mapping[str, str]:
    found = {"preset": config.preset}
    for name in SECTIONS:
        for field, value in dataclasses.asdict(getattr(config, name)).items():
            found[flag_of(field)] = (
                " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            )
    for flag in ("--save", "--load", "--grow"):  # where files lie is no setting
        found.pop(flag)
    return found


def commands_section(runs: Sequence[RecordedRun], output: Path) -> str:
    """Return the commands that trained each run, and the one that made this page."""
    lines: list[str] = []
    for run in runs:
        lines += [f"# {run.name}", *_commands_of(run), ""]
    words = shlex.join([*map(str, (run.folder for run in runs)), "--output", str(output)])
    return section("Commands", code([*lines, "# this page", f"{command('report')} {words}"]))


def _commands_of(run: RecordedRun) -> Iterator[str]:
    if not run.commands:
        yield "# its commands are not recorded: an earlier version trained it"
    for record in run.commands:
        yield f"{record['command']}    # from step {record.get('step', '?')}, {record.get('time', '?')}"
