"""Hooks of mkdocs: formulas as MathML, and reference pages that are made from the code.

reference/configuration.md    every flag and YAML key, from the fields of `config.run_config`
reference/cli.md              every verb of `nexus`, from its --help
reference/api/<package>.md    every public module, for mkdocstrings
contributing.md, changelog.md the files of the repository's root
"""

import ast
import dataclasses
import html
import os
import subprocess
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_nexus.config.config_field import MOST, Bounds
from megatron_nexus.config.presets import DEFAULT_PRESET, PRESETS
from megatron_nexus.config.run_config import ALL_SECTIONS

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "megatron_nexus"
WIDTH = "90"
"""Columns of a help text."""

RUN = "import sys; from megatron_nexus.cli.main import main; sys.argv[0] = 'nexus'; main()"
"""The program `nexus`, installed or not."""

WIDE = {
    "workarounds",
    "analysis",
    "fidelity",
    "performance",
    "paper_numbers",
    "initial_values",
    "configuration",
    "unlearning",
}
"""Pages of wide tables, which take the place of the table of contents."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Turn fences of the language `math` into MathML and list the pages of the API in the navigation."""
    fences = {"name": "math", "class": "math", "format": _formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fences]}
    assert isinstance(config.nav, list)
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    api = next(entry for entry in reference if "API" in entry)
    api["API"] = [{package.partition(".")[2] or package: _api_path(package)} for package in _packages()]
    return config


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Hide the table of contents of pages that need its place; find the guide before the API."""
    if page.file.name in WIDE:
        page.meta["hide"] = ["toc"]
    if page.file.src_uri.startswith("reference/api/"):
        page.meta["search"] = {"boost": 0.2}
    return markdown


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    pages = {"reference/configuration.md": configuration_page(), "reference/cli.md": command_line_page()}
    pages |= {_api_path(package): api_page(package) for package in _packages()}
    pages |= {
        f"{name.lower()}.md": (REPOSITORY / f"{name}.md").read_text()
        for name in ("CONTRIBUTING", "CHANGELOG")
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _formula(source: str, *_: Any, **__: Any) -> str:
    """Return each formula of a fence, separated by empty lines, as a block of MathML."""
    return "".join(convert(formula, display="block") for formula in source.split("\n\n") if formula.strip())


def configuration_page() -> str:
    """Return a table of each section of the configuration: flag, type, default, meaning."""
    return "\n".join(_configuration_lines())


def _configuration_lines() -> Iterator[str]:
    yield "# Configuration reference\n"
    yield (
        "A run is a frozen `RunConfig` of the sections below. Each field is a flag of `nexus train` and a "
        f"key of a YAML file (`--config`). Defaults are those of the preset `{DEFAULT_PRESET}`, which a run "
        "without flags uses; `nexus presets` lists the others. Flags override the file, the file overrides "
        "the preset. This page is generated from `megatron_nexus/config/run_config.py`.\n"
    )
    for section, fields in ALL_SECTIONS.items():
        yield f"## {section}\n\n{(fields.__doc__ or '').strip()}\n"
        yield "| flag | type | default | meaning |\n|---|---|---|---|"
        hints = get_type_hints(fields)
        for entry in dataclasses.fields(fields):
            name = entry.name.replace("_", "-")
            flags = [f"--{name}", *entry.metadata["aliases"]]
            default = PRESETS[DEFAULT_PRESET].get(entry.name, entry.default)
            spelt = "<br>".join(f"`{flag}`" for flag in flags)
            kind = _kind(hints[entry.name]) + _range(entry.metadata["bounds"])
            yield (
                f'| <span id="{name}"></span>{spelt} | {kind} '
                f"| {_value(default)} | {_cell(entry.metadata['help'])}"
                f"{'; *can grow*' if entry.metadata['grows'] else ''} |"
            )
        yield ""


def _kind(hint: Any) -> str:
    """Return a type as a reader of the command line sees it."""
    if hint is bool:
        return "switch"
    if get_origin(hint) is tuple:
        return "words"
    if get_origin(hint) is not None:
        return "<br>".join(f"`{choice}`" for choice in get_args(hint))
    return {int: "integer", float: "number", str: "text"}[hint]


def _range(bounds: Bounds | None) -> str:
    """Return the bounds of a number that a reader would not guess."""
    if bounds is None:
        return ""
    if bounds.below < inf:
        return f", 0 to below {bounds.below:g}"
    if bounds.maximum < MOST:
        return f", {int(bounds.positive)} to {bounds.maximum:,}"
    return " > 0" if bounds.positive else " ≥ 0"


def _value(value: object) -> str:
    match value:
        case bool():
            return "on" if value else "off"
        case "" | ():
            return ""
        case _:
            return f"`{value}`"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")


def command_line_page() -> str:
    """Return the help of every verb of `nexus`."""
    lines = [
        "# Command line reference\n",
        "`nexus VERB` and `python -m megatron_nexus VERB` are the same. This page is generated: each block "
        "is what the command prints.\n",
        _help([]),
    ]
    for verb in verbs():
        lines += [f"## nexus {verb}\n", _help([verb])]
    return "\n".join(lines)


def _help(words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": WIDTH},
    )
    return f"```text\n{done.stdout.rstrip()}\n```\n"


def verbs() -> list[str]:
    """Return the verbs of `nexus`."""
    from megatron_nexus.cli.verbs import VERBS

    return list(VERBS)


def _packages() -> list[str]:
    """Return the packages with public modules, the one of all first."""
    below = {path.parent.relative_to(REPOSITORY).as_posix() for path in _modules()}
    return sorted(package.replace("/", ".") for package in below)


def _api_path(package: str) -> str:
    return f"reference/api/{package.rpartition('.')[2]}.md"


def _modules() -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.name.startswith("_") and "remote_code" not in path.parts
    ]


def api_page(package: str) -> str:
    """Return the directives that have mkdocstrings document the modules of a package."""
    folder = REPOSITORY / package.replace(".", "/")
    lines = [f"# {package.partition('.')[2] or package}\n", f"{_docstring(folder / '__init__.py')}\n"]
    for path in _modules():
        if path.parent == folder:
            lines += [f"## {path.stem}\n", f"::: {package}.{path.stem}\n"]
    return "\n".join(lines)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""
