"""What the OpenAPI document promises, held against a running server: generated requests, valid and not.

Schemathesis makes the requests from the document and judges the answers by it. Its pytest plugin is not used (it costs
every test run a second); the seed is fixed, so that a failure comes again.

`GET /subscribe` is left out, since its answer does not end. Two promises are not asked of every request:

- that what fits the document is accepted: two spellings that differ, cursors of no page, or a body that names nothing
  are refused, and a schema cannot say so. Such a refusal has to name the field instead;
- that what does not fit is refused: a blank parameter is one that was not given, and a batch answers for each message.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sagaloom import SagaMessage, define_saga
from sagaloom.cli.document import api_document
from sagaloom.kv import SqliteKeyValue
from sagaloom.runtime import RuntimeOptions, SagaRuntime
from sagaloom.service import create_app
from sagaloom.stores import KvSagaStore
from sagaloom.testing import check_invariants
from tests.doors.http_door import PREFIX, Payments, Switch, note_saga, order_saga, serve

EXAMPLES = 15
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
ENDLESS = f"{PREFIX}/subscribe"
BATCH = f"{PREFIX}/publish/batch"

load_all_checks()
schema = schemathesis.openapi.from_dict(api_document(needs_token=False))
OPERATIONS = {operation.label: operation for operation in (result.ok() for result in schema.get_all_operations())}


@contextlib.asynccontextmanager
async def served(path: Path) -> AsyncIterator[int]:
    """A runtime with instances, a dead letter and a schedule, and the API in front of it; nothing is broken after."""
    report = define_saga("report").state({}).on("report:tick", lambda saga, event, context: []).schedule("0 3 * * *")
    kv = await SqliteKeyValue.open(path)
    store = KvSagaStore(kv)
    runtime = SagaRuntime(
        store,
        definitions=[order_saga(Switch()), note_saga(), report.build()],
        targets=[Payments()],
        options=RuntimeOptions(wait_seconds_max=1.0),
    )
    try:
        async with runtime:
            for message_type in ("OrderPlaced", "OrderShipped"):
                await runtime.publish(SagaMessage(message_type, {"amount": 1}, correlation_key="o-1"))
            async with serve(create_app(runtime)) as port:
                yield port
            await runtime.settled()
        assert await check_invariants(store) == []
    finally:
        await kv.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("schemathesis") / "sagas.db"
    with start_blocking_portal("asyncio") as portal, portal.wrap_async_context_manager(served(path)) as port:
        yield f"http://127.0.0.1:{port}"


def _can_be_wrong(label: str) -> bool:
    """Whether there are requests that do not fit: where only a text is asked for, any text does."""
    definition: dict[str, Any] = OPERATIONS[label].definition.raw
    bounded = [one for one in definition.get("parameters", ()) if one["in"] == "query" or "maxLength" in one["schema"]]
    return bool(bounded) or "requestBody" in definition


ASKED = [label for label in OPERATIONS if not label.endswith(ENDLESS)]
CASES = [
    *[(label, GenerationMode.POSITIVE) for label in ASKED],
    *[(label, GenerationMode.NEGATIVE) for label in ASKED if _can_be_wrong(label)],
]


@pytest.mark.parametrize(("label", "mode"), CASES, ids=[f"{mode.value} {label}" for label, mode in CASES])
def test_answers_are_what_the_document_promises(url: str, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]
    logging.getLogger("urllib3").setLevel(logging.WARNING)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(mode))
    def asked(case: Case[Any]) -> None:
        response = case.call(base_url=url)
        checks = list(CHECKS)
        if mode is GenerationMode.NEGATIVE and not label.endswith(BATCH) and not _has_blank(response):
            checks.append(negative_data_rejection)
        case.validate_response(response, checks=checks)
        if mode is GenerationMode.POSITIVE and response.status_code == 422:
            _check_names_a_field(response)

    asked()


def test_every_route_of_the_document_is_asked() -> None:
    assert len(OPERATIONS) > 20
    assert any(label.endswith(ENDLESS) for label in OPERATIONS)


def _has_blank(response: Response) -> bool:
    query = urlsplit(str(response.request.url)).query
    return any(value == "" for _, value in parse_qsl(query, keep_blank_values=True))


def _check_names_a_field(response: Response) -> None:
    """A refusal for a reason that no schema can express says at least where it is."""
    problem = response.json()
    if problem["code"] == "VALIDATION_ERROR" and "saga '" not in problem["message"]:
        data = problem.get("data", {})
        assert data.get("fieldErrors") or data.get("formErrors"), problem
