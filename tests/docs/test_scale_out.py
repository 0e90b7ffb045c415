"""docs/howto/scale-out.md, typed as it stands, on a schema of the test's own."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.docs.pages import DOCS, blocks_of, commands_of, is_printed, with_free_ports
from tests.docs.shell import Shell, free_ports
from tests.schemas import Schema


async def test_the_commands_of_the_page_print_what_it_says(schema: Schema, tmp_path: Path) -> None:
    connection = await schema.connect()
    await connection.execute(f"CREATE SCHEMA {schema.name}_page")
    try:
        await asyncio.to_thread(_type_all, tmp_path, f"{schema.server_url}?schema={schema.name}_page")
    finally:
        await connection.execute(f"DROP SCHEMA {schema.name}_page CASCADE")
        await connection.close()


def _type_all(directory: Path, url: str) -> None:
    ports = free_ports()
    address = f"http://127.0.0.1:{ports['8092']}"
    with Shell(directory, {"PORT": ports["8092"], "SAGALOOM_URL": address, "DATABASE_URL": url}) as shell:
        for block in blocks_of(DOCS / "howto" / "scale-out.md"):
            if block.file is not None:
                (directory / block.file).write_text(block.content)
            elif block.language == "console" and not block.is_shown_only:
                for command in commands_of(block):
                    expected = [with_free_ports(line, ports) for line in command.prints]
                    _, printed, came = shell.run(command.typed, until=lambda lines: is_printed(expected, lines))  # noqa: B023
                    assert came, "\n".join([f"$ {command.typed}", *printed, "-- and not", *expected, *shell.logged()])
