"""The page at `/api/docs`: the OpenAPI document, readable. One HTML page, made here; it loads nothing and runs nothing.

A ready-made viewer would be a megabyte of script from elsewhere, to show a dozen routes. This one is finished when it
arrives, works without a network, and its policy forbids everything but its own style sheet.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

import msgspec

__all__ = ["DOCS_PAGE_POLICY", "docs_page"]

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --get: #2563eb; --post: #15803d; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; text-transform: capitalize; }
code, pre { font: 0.875rem/1.45 ui-monospace, monospace; }
pre { background: var(--soft); padding: 0.75rem; border-radius: 0.375rem; overflow-x: auto; margin: 0.25rem 0 1rem; }
details { border: 1px solid var(--line); border-radius: 0.375rem; margin: 0.5rem 0; }
summary { cursor: pointer; padding: 0.5rem 0.75rem; }
summary code { font-weight: 600; overflow-wrap: anywhere; }
details > div { padding: 0 0.75rem 0.5rem; }
.method { display: inline-block; min-width: 3.5rem; font-weight: 700; color: var(--get); }
.method.post { color: var(--post); }
table { border-collapse: collapse; width: 100%; margin-bottom: 1rem; }
th, td { text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
th, td { padding: 0.375rem 0.75rem 0.375rem 0; }
td:first-child { white-space: nowrap; } small { opacity: 0.75; }
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
DOCS_PAGE_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def docs_page(document: Mapping[str, Any]) -> bytes:
    """The page for an OpenAPI document, as UTF-8."""
    return "\n".join(_page(document)).encode()


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>"
    yield f"<p>{escape(info['summary'])} The same for programs: <a href='openapi.json'>openapi.json</a>.</p>"
    yield f"<p>{_prose(info['description'])}</p>"
    if "security" in document:
        yield "<p>Every route but <code>/health/live</code> needs <code>Authorization: Bearer &lt;token&gt;</code>.</p>"
    for tag in document["tags"]:
        yield f"<h2>{escape(tag['name'])}</h2>"
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    yield from _operation(method, path, operation)
    yield "<h2>Shapes</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f"<details id='{escape(name)}'><summary><code>{escape(name)}</code></summary><div>"
        if "description" in schema:
            yield f"<p>{_prose(schema['description'])}</p>"
        yield from _properties(schema)
        yield "</div></details>"
    yield "</body></html>"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<details><summary><span class='method {escape(method)}'>{escape(method.upper())}</span>"
    yield f"<code>{escape(path)}</code></summary><div><p>{_prose(operation.get('description', ''))}</p>"
    if operation.get("parameters"):
        yield "<table><tr><th>parameter</th><th>in</th><th>what</th></tr>"
        for one in operation["parameters"]:
            name, where = escape(one["name"]), escape(one["in"])
            yield f"<tr><td><code>{name}</code></td><td>{where}</td><td>{_type_of(one['schema'])}"
            yield f" {_prose(one.get('description', ''))}</td></tr>"
        yield "</table>"
    if "requestBody" in operation:
        yield "<h4>Body</h4>"
        yield from _content(operation["requestBody"])
    for status, response in operation["responses"].items():
        yield f"<h4>{escape(status)} <small>{_prose(response['description'])}</small></h4>"
        if int(status) < 400:
            yield from _content(response)
    yield "</div></details>"


def _content(holder: Mapping[str, Any]) -> Iterator[str]:
    for content in holder["content"].values():
        yield f"<p>{_type_of(content['schema'])}</p>"
        if "example" in content:
            text = msgspec.json.format(msgspec.json.encode(content["example"]), indent=2).decode()
            yield f"<pre>{escape(text)}</pre>"


def _properties(schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    yield "<table>"
    for name, one in schema.get("properties", {}).items():
        is_optional = "" if name in required else " <small>(optional)</small>"
        yield f"<tr><td><code>{escape(name)}</code></td><td>{_type_of(one)}{is_optional}"
        yield f" {_prose(one.get('description', ''))}</td></tr>"
    yield "</table>"


def _type_of(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_type_of(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(one))}</code>" for one in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type_of(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any JSON")))


def _prose(text: str) -> str:
    """Plain text with `code` in backquotes, as HTML."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
