"""The documents say what the code does: flags, routes, parameters, error codes, links, examples.

`python tests/test_docs.py` writes the tables of flags, of sampling parameters and of models into their pages.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
from running_server import running_server

from splitfuse.cli.commands import app
from splitfuse.cli.models import HEADS, cells
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import GatewayConfig, ServerConfig
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.sampling_params import PARAMETERS
from splitfuse.errors import (
    AdapterError,
    DrainingError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
    RequestQuarantinedError,
    RequestTooLargeError,
)
from splitfuse.models.families.table import rows as model_rows
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from splitfuse.server.app import ROUTES
from splitfuse.server.errors import answer_to
from splitfuse.server.openai.protocol import ChatRequest, CompletionRequest
from splitfuse.server.responses.protocol import ResponseRequest
from splitfuse.server.sampling import FIELDS, SamplingFields

ROOT = Path(__file__).parents[1]
SERVER_PAGE = ROOT / "docs" / "server.md"
ANTHROPIC_PAGE = ROOT / "docs" / "anthropic.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RESPONSES_PAGE = ROOT / "docs" / "responses.md"
GLOSSARY = ROOT / "docs" / "glossary.md"
TODAY = [page for page in PAGES if page.parent.name != "decisions" and page.name not in ("CHANGELOG.md", "log.md")]
"""Pages that describe the code as it is; the others are history."""
FILES = sorted(f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.*") if ".venv" not in path.parts)
BEGIN, END = "<!-- {}: python tests/test_docs.py writes this table -->\n", "<!-- end of {} -->\n"

ERRORS = (
    *(InvalidRequestError(""), PromptTooLongError(""), RequestTooLargeError(""), OverloadedError("", retry_after=1.0)),
    *(EngineUnavailableError(""), DrainingError(""), RequestFailedError(""), ValueError("")),
    *(RequestQuarantinedError(""), AdapterError("")),
)
GENERATING = {"completions": CompletionRequest, "chat": ChatRequest}


def flag_table() -> str:
    """Every setting of a server and of its engines, as a table."""
    return _table_of(
        [*dataclasses.fields(ServerConfig), *(field for _, field in EngineConfig.setting_fields().values())]
    )


def gateway_table() -> str:
    """Every setting of a gateway, as a table."""
    return _table_of(dataclasses.fields(GatewayConfig))


def _table_of(fields: Iterable[dataclasses.Field[Any]]) -> str:
    lines = []
    for field in fields:
        name = field.name.replace("_", "-")
        lines.append(f"| `--{name}` | {_default(name, field.default)} | {field.metadata['help']} |\n")
    return "".join(["| flag | default | |\n", "|---|---|---|\n", *lines])


def sampling_table() -> str:
    """Every sampling parameter that both routes take, as a table."""
    lines = []
    for parameter in (PARAMETERS[name] for name in FIELDS):
        left_out = "none" if parameter.openai_default in (None, (), {}) else json.dumps(parameter.openai_default)
        lines.append(f"| `{parameter.name}` | {parameter.description} | {left_out.removesuffix('.0')} |\n")
    return "".join(["| parameter | value | left out |\n", "|---|---|---|\n", *lines])


def model_table() -> str:
    """Every architecture, as a table."""
    lines = [f"| `{name}` | {' | '.join(others)} |\n" for name, *others in cells()]
    return "".join([f"| {' | '.join(HEADS)} |\n", f"|{'---|' * len(HEADS)}\n", *lines])


TABLES = {
    "flags": (SERVER_PAGE, flag_table),
    "gateway": (ROOT / "docs" / "gateway.md", gateway_table),
    "sampling": (SERVER_PAGE, sampling_table),
    "models": (ROOT / "docs" / "models.md", model_table),
}


def _default(name: str, value: object) -> str:
    if value is True:
        return f"on; `--no-{name}`"
    return "" if value is False or value in (None, ()) else f"`{value}`"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def rows(page: Path, header: str) -> list[list[str]]:
    """The cells of the table that begins with that line."""
    _, found, after = text_of(page).partition(f"\n{header}\n")
    assert found, f"{page.name} has no table {header}"
    lines = after.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(page: Path, language: str) -> list[str]:
    """The blocks of code in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_a_generated_table_is_that_of_the_code(name: str) -> None:
    page, table = TABLES[name]
    written = text_of(page).partition(BEGIN.format(name))[2].partition(END.format(name))[0].strip()
    assert written == table().strip(), "run python tests/test_docs.py"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "roadmap.md"], ids=lambda page: page.stem)
def test_the_number_of_architectures_is_that_of_the_code(page: Path) -> None:
    assert re.findall(r"(\d+) architectures", text_of(page)) == [str(len(model_rows()))]


def test_the_table_of_flags_has_what_the_command_takes() -> None:
    group = typer.main.get_command(app)
    command = group.commands["serve"]  # type: ignore[attr-defined]
    taken = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts) if flag[:2] == "--"}
    assert (
        set(re.findall(r"`(--[\w-]+)`", flag_table()))
        | {
            "--no-log-prompts",
            "--no-enable-slo",
            "--no-console",
            "--no-otel",
            "--no-engine-tls",
            "--no-kv-loans",
            "--no-batch-invariant",
            "--no-cuda-graphs",
        }
        == taken
    )


def test_the_table_of_routes_is_complete() -> None:
    described = {re.sub(r"`", "", row[0]) for row in rows(SERVER_PAGE, "| route | does |")}
    assert described == {f"{route.method} {route.template}" for route in ROUTES}


def test_the_table_of_parameters_has_all_that_are_honoured() -> None:
    described = {
        (name, kind)
        for row in rows(SERVER_PAGE, "| parameter | of | values | left out |")
        for name in re.findall(r"`(\w+)`", row[0])
        for kind in (GENERATING if row[1] == "both" else [row[1]])
    } | {
        (row[0].strip("`"), kind)
        for row in rows(SERVER_PAGE, "| parameter | value | left out |")
        for kind in GENERATING
    }
    assert described == {
        (name, kind) for kind, body in GENERATING.items() for name in body.__struct_fields__ if name not in body.NEUTRAL
    }


def test_the_fields_of_messages_are_all_described() -> None:
    described = [
        name for row in rows(ANTHROPIC_PAGE, "| field | values | left out |") for name in re.findall(r"`(\w+)`", row[0])
    ]
    assert sorted(described) == MessagesRequest.supported()
    of_conversations = CountTokensRequest.supported()
    assert sorted(described[: len(of_conversations)]) == of_conversations


def test_the_parameters_of_responses_are_described() -> None:
    honoured = {
        name
        for row in rows(RESPONSES_PAGE, "| parameter of a response | values | left out |")
        for name in re.findall(r"`(\w+)`", row[0])
    }
    shared = {*SamplingFields.__struct_fields__, *ResponseRequest.NEUTRAL}
    assert honoured == set(ResponseRequest.__struct_fields__) - shared
    refused = {
        row[0].strip("`"): set(re.findall(r"`([^`]+)`", row[1]))
        for row in rows(RESPONSES_PAGE, "| parameter of a response | values that pass, besides null |")
    }
    assert refused == {
        name: {json.dumps(value) for value in values if value is not None}
        for name, values in ResponseRequest.NEUTRAL.items()
    }


def test_refused_parameters_are_listed_with_their_neutral_values() -> None:
    described = {
        (row[0].strip("`"), kind): set(re.findall(r"`([^`]+)`", row[2].partition(", and")[0]))
        for row in rows(SERVER_PAGE, "| parameter | of | values that pass, besides null |")
        for kind in (GENERATING if row[1] == "both" else [row[1]])
    }
    assert described == {
        (name, kind): {json.dumps(value) for value in values if value is not None}
        for kind, body in GENERATING.items()
        for name, values in body.NEUTRAL.items()
    }


def test_the_table_of_errors_has_every_code() -> None:
    sources = "".join(text_of(path) for path in (ROOT / "splitfuse" / "server").rglob("*.py"))
    statuses = dict.fromkeys(re.findall(r'\bcode="(\w+)"', sources), 404)  # of a route, starlette says it
    statuses |= {c: int(s) for s, c in re.findall(r'RefusedError\(\s*(\d+),.*?\bcode="(\w+)"', sources, re.DOTALL)}
    statuses |= {answer.code: answer.status for answer in map(answer_to, ERRORS)}
    described = {row[1].strip("`"): int(row[0]) for row in rows(SERVER_PAGE, "| status | `code` | why |")}
    assert described == statuses


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", text_of(ROOT / "docs" / "README.md")))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_every_benchmark_is_in_the_list_of_benchmarks() -> None:
    folder = ROOT / "benchmarks"
    listed = set(re.findall(r"`(\w+)`", text_of(folder / "README.md"))) - {"NAME"}
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert listed == there
    pages = set(re.findall(r"\(results/([\w-]+\.md)\)", text_of(folder / "README.md")))
    assert pages == {page.name for page in (folder / "results").glob("*.md")}


@pytest.mark.parametrize("page", TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(r"`([\w/.-]+\.(?:py|h|cpp|md))`", text_of(page)):
        assert any(file.endswith(f"/{name}") for file in FILES), f"{page.name}: {name}"


def test_the_table_of_latency_phases_is_complete() -> None:
    page = ROOT / "docs" / "slo.md"
    described = [name for row in rows(page, "| where | phase | time |") for name in re.findall(r"`(\w+)`", row[1])]
    assert described == [phase.value for phase in LatencyPhase]


def test_the_architecture_names_functions_in_their_files() -> None:
    table_rows = architecture_rows(text_of(ROOT / "docs" / "architecture.md"))
    assert len(table_rows) > 30
    for places, names in table_rows:
        sources = "".join(source_of(ROOT / "splitfuse" / place) for place in places)
        missing = [name for name in names if not re.search(rf"\b(def|class) {name}\b", sources)]
        assert missing == [], f"{places}"


def architecture_rows(text: str) -> list[tuple[list[str], list[str]]]:
    """The files of each row of the tables "where, function", and the names that it gives: `A.b` is the class and its
    method.
    """
    tables = re.findall(r"^\| where \| function \|.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert len(tables) == 2
    cells = re.findall(r"^\|([^|]*`[^|]*)\|([^|]*`[^|]*)\|", "".join(tables), re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", where), re.findall(r"\w+", function)) for where, function in cells]


def source_of(place: Path) -> str:
    """The source of a module, or of all modules in a folder."""
    return "".join(text_of(path) for path in (place.glob("*.py") if place.is_dir() else [place]))


def test_the_glossary_has_our_flags_and_classes() -> None:
    flags = {flag for row in rows(GLOSSARY, "| ours | vLLM |") for flag in re.findall(r"`(--[\w-]+)`", row[0])}
    assert flags <= set(re.findall(r"`(--[\w-]+)`", flag_table()))
    sources = "".join(text_of(path) for path in (ROOT / "splitfuse").rglob("*.py"))
    names = [name for row in rows(GLOSSARY, "| here | what it is | vLLM |") for name in re.findall(r"`(\w+)`", row[0])]
    assert [name for name in names if not re.search(rf"^(class )?{name}\b", sources, re.MULTILINE)] == []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    pages = (ROOT / "README.md", SERVER_PAGE, ANTHROPIC_PAGE, RESPONSES_PAGE)
    blocks = [block for page in pages for block in code(page, "python")]
    examples = [block for block in blocks if "OpenAI(" in block or "httpx" in block]
    assert len(examples) == 5
    with running_server(ServerConfig(served_model_name=BUNDLED_MODEL.name)) as server:
        for example in examples:
            assert "http://127.0.0.1:8000" in example
            exec(compile(example.replace("http://127.0.0.1:8000", server.url), "example", "exec"), {})
            assert "Anna keeps a goose." in capsys.readouterr().out


def write() -> None:
    for name, (page, table) in TABLES.items():
        before, begin, rest = text_of(page).partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        assert begin and end, f"the place of the table of {name} is not marked"
        page.write_text(before + begin + "\n" + table() + "\n" + end + after, encoding="utf-8")


if __name__ == "__main__":
    write()
