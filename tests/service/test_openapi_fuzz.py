"""Every route under requests made from the service's OpenAPI document, those it allows and others.

No answer is a failure of the service, every error is problem+json, and the document names its status. The stream of
events has no end and is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic import layer_rows, scalar_rows, write_run

from brn_core import wire
from service.schemas import Problem
from service.store import Store

EXAMPLES: Final = 25
"""Requests a route."""

RUN: Final = "fuzzed"

Document = dict[str, Any]
Values = st.SearchStrategy[Any]

# Any text, lone surrogates too, which JSON can carry and UTF-8 cannot; in a URL they cannot be written.
_TEXT: Final = st.text(st.characters(exclude_categories=()), max_size=12)
_URL_TEXT: Final = st.text(max_size=12)
_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_BATCH: Final = {"layers": layer_rows([1], 2), "scalars": scalar_rows({"loss": [(1, 1.0)]})}
_KNOWN: Final[dict[str, list[Any]]] = {
    "run": [RUN],
    "cursor": ["MQ==", "bnVsbA==", "W10=", "WyJjcmVhdGVkIiwgMSwgImEiXQ=="],
    "code": ["NH-CLUSTERED"],
    "stat": ["gap", "clip_r"],
    "name": ["loss"],
    "layer": [0, 2, 3],
    "rank": [0, 1],
    "from": [0, 5, 2**63, 2**64],
    "to": [5, 20, 2**63, 2**64],
    "step": [1, 2**64],
    "accept": ["application/json", wire.MEDIA_TYPE, "*/*"],
}
"""What a parameter of this name is in a request that the document allows, and may be in others."""


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    says: Document
    definitions: Document

    def requests(self) -> Values:
        """Arguments of `httpx.Client.request`, and the values in the path."""
        return st.booleans().flatmap(self._requests)

    def _requests(self, odd: bool) -> Values:
        def among(place: str) -> dict[str, Values]:
            found = [parameter for parameter in self.says.get("parameters", []) if parameter["in"] == place]
            return {one["name"]: self._parameter(one, odd) for one in found}

        required = {one["name"] for one in self.says.get("parameters", []) if one.get("required")}
        query = among("query")
        return st.fixed_dictionaries(
            {
                "path": st.fixed_dictionaries(among("path")),
                "query": st.fixed_dictionaries(
                    {name: values for name, values in query.items() if name in required and not odd},
                    optional={name: values for name, values in query.items() if name not in required or odd},
                ),
                "headers": st.fixed_dictionaries({}, optional=among("header")),
                "body": self._bodies(odd),
            }
        )

    def _parameter(self, parameter: Document, odd: bool) -> Values:
        name, place = parameter["name"], parameter["in"]
        values = self._values(parameter["schema"], _URL_TEXT, odd)
        if name in _KNOWN:
            likely = st.sampled_from(_KNOWN[name])
            if "items" in json.dumps(parameter["schema"]):
                likely = st.lists(likely, min_size=1, max_size=3)
            values = values | likely if odd else likely
        if place == "header":
            return values.map(lambda value: quote(str(value), safe="/* ;=,"))
        return values.map(str).filter(bool) if place == "path" else values

    def _bodies(self, odd: bool) -> Values:
        """Media type and content; None where the operation takes no body."""
        if "requestBody" not in self.says:
            return st.none()
        kinds: list[Values] = []
        for media, content in self.says["requestBody"]["content"].items():
            if media == "application/json":
                texts = self._values(content["schema"], _TEXT, odd).map(lambda value: json.dumps(value).encode())
            else:
                whole = wire.encode_batch(_BATCH)
                texts = st.just(whole) | st.binary(max_size=64) | st.integers(0, len(whole)).map(lambda n: whole[:n])  # noqa: B023
            kinds.append(st.tuples(st.just(media), texts | st.binary(max_size=20) if odd else texts))
        if odd:
            kinds.append(st.tuples(st.sampled_from(["text/plain", "", "application/json; charset=x"]), st.binary()))
        return st.one_of(kinds)

    def _values(self, schema: Document, text: Values, odd: bool) -> Values:
        """What a schema allows; of odd ones, one in five is anything else."""
        allowed = self._allowed(schema, text, odd)
        if not odd:
            return allowed
        other = text | st.integers() | st.floats() if text is _URL_TEXT else _JSON
        return st.integers(0, 4).flatmap(lambda n: allowed if n else other)

    def _allowed(self, schema: Document, text: Values, odd: bool) -> Values:
        if "$ref" in schema:
            return self._values(self.definitions[schema["$ref"].rpartition("/")[2]], text, odd)
        if "anyOf" in schema:
            return st.one_of([self._values(each, text, odd) for each in schema["anyOf"]])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        match schema.get("type"):
            case "null":
                return st.none()
            case "boolean":
                return st.booleans()
            case "integer":
                low = schema.get("minimum")
                high = schema.get("maximum", schema.get("exclusiveMaximum", 2**70 + 1) - 1)
                return st.integers(None if low is None else int(low), int(high))
            case "number":
                return st.floats(
                    schema.get("minimum", schema.get("exclusiveMinimum")),
                    schema.get("maximum", schema.get("exclusiveMaximum")),
                    exclude_min="exclusiveMinimum" in schema,
                    exclude_max="exclusiveMaximum" in schema,
                )
            case "string" if "pattern" in schema:
                return st.from_regex(schema["pattern"], fullmatch=True)
            case "string":
                shortest = schema.get("minLength", 0)
                return text.filter(lambda value: len(value) >= shortest)
            case "array":
                return st.lists(self._values(schema["items"], text, odd), max_size=3)
            case "object" if "properties" in schema:
                fields = {name: self._values(each, text, odd) for name, each in schema["properties"].items()}
                required = schema.get("required", ())
                return st.fixed_dictionaries(
                    {name: fields[name] for name in required},
                    optional={name: values for name, values in fields.items() if name not in required},
                )
            case "object":
                return st.dictionaries(_TEXT, _JSON, max_size=3)
        assert set(schema) <= {"title", "description", "default"}, f"say here what {schema} allows"
        return _JSON


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _send(client: httpx.Client, operation: Operation, request: Document) -> httpx.Response:
    path = operation.path
    for name, value in request["path"].items():
        path = path.replace(f"{{{name}}}", quote(value, safe=""))
    pairs = [
        (name, _text(each))
        for name, value in request["query"].items()
        if value is not None
        for each in (value if isinstance(value, list) else [value])
    ]
    headers = dict(request["headers"])
    content = None
    if request["body"] is not None:
        headers["content-type"], content = request["body"]
    return client.request(operation.method, path, params=pairs, headers=headers, content=content)


@pytest.fixture(scope="module")
def operations(client: httpx.Client) -> list[Operation]:
    """All but the stream of events; those that delete come last."""
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    found = [
        Operation(method.upper(), path, says, schemas)
        for path, methods in document["paths"].items()
        for method, says in methods.items()
        if not path.endswith("/events")
    ]
    write_run(client, RUN, layers=3, steps=20, ranks=2)
    return sorted(found, key=lambda operation: operation.method == "DELETE")


@pytest.fixture
def leaves_no_runs(store: Store) -> Iterator[None]:
    before = {run.record.id for run in store.records()}
    yield
    store.delete_runs({run.record.id for run in store.records()} - before | {RUN})


@pytest.mark.usefixtures("leaves_no_runs")
def test_no_request_makes_the_service_fail_and_every_error_is_a_problem_that_the_document_names(
    client: httpx.Client, operations: list[Operation]
) -> None:
    seen: dict[int, int] = {}

    def check(operation: Operation, request: Document) -> None:
        answer = _send(client, operation, request)
        shown = f"{answer.request.method} {answer.request.url} {request}: {answer.status_code} {answer.text[:500]}"
        assert answer.status_code < 500, shown
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json", shown
            assert Problem.model_validate(answer.json()).status == answer.status_code, shown
        if not any("/" in value or value in (".", "..") for value in request["path"].values()):  # else another route
            assert str(answer.status_code) in operation.says["responses"], shown

    def fuzz(operation: Operation) -> None:
        @given(operation.requests())
        @hypothesis_settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def every(request: Document) -> None:
            check(operation, request)

        every()

    for operation in operations:
        fuzz(operation)
    assert {200, 201, 204, 404, 422} <= seen.keys(), "valid requests and invalid ones were made"
