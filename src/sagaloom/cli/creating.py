"""`sagaloom new NAME`: a project with a saga, a job, their tests and a Makefile.

The files are in `template/`, as they will be but for three words in double braces: the project's name, that of its
package, and how it asks for sagaloom. That last one is what this installation itself came from (PEP 610): a release
from an index is asked for by its version, a checkout or a repository by its address, so that the new project gets the
same sagaloom as whoever made it.
"""

from __future__ import annotations

import json
import keyword
import re
import sys
from collections.abc import Mapping
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

from sagaloom.cli.client import CommandFailed

__all__ = ["create_project", "requirement"]

_SUFFIX: Final = ".txt"
"""What the files of the template end in: they are no modules, and no tests, of ours."""

_NAME: Final = re.compile(r"[a-z](?:[a-z0-9]|-(?=[a-z0-9]))*")
_TAKEN: Final = frozenset(("tests", "sagaloom", "pytest"))
_DIRECT_REFERENCES: Final = """
# sagaloom comes from an address and not from an index. Write "sagaloom>={version}" above once it may.
[tool.hatch.metadata]
allow-direct-references = true
"""


def create_project(name: str, folder: Path) -> list[Path]:
    """Writes the project `name` into `folder`, and returns its files. Raises `CommandFailed` for a name that cannot be
    that of a project, and for a folder that is not empty."""
    if not _NAME.fullmatch(name) or len(name) > 50:
        raise CommandFailed(
            f"{name!r:.80} is no name for a project: begin with a letter, and go on with small letters, digits and "
            "single hyphens, such as 'my-shop'",
            exit_code=2,
        )
    package = name.replace("-", "_")
    if package in _TAKEN or package in sys.stdlib_module_names or keyword.iskeyword(package):
        raise CommandFailed(
            f"{name!r} is taken: Python has a module or a word of that name; choose another", exit_code=2
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandFailed(f"{folder} is there already, and not empty: choose another name, or --into another folder")
    wanted = requirement()
    is_direct = " @ " in wanted
    words = {
        "name": name,
        "package": package,
        "sagaloom": wanted,
        "direct_references": _DIRECT_REFERENCES.format(version=_version()) if is_direct else "",
    }
    written: list[Path] = []
    try:
        for place, text in _files(resources.files("sagaloom.cli") / "template", package):
            file = folder / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_filled(text, words), encoding="utf-8")
            written.append(file)
    except OSError as error:
        raise CommandFailed(f"{folder} cannot be written: {error.strerror or error}") from error
    return sorted(written)


def requirement(direct_url: str | None = None) -> str:
    """How a project asks for the sagaloom that is installed here. `direct_url` is the content of the file by which
    installers remember an address; by default ours.

    >>> requirement('{"url": "file:///src/sagaloom", "dir_info": {"editable": true}}')
    'sagaloom @ file:///src/sagaloom'
    >>> requirement('{"url": "https://example.org/s.git", "vcs_info": {"vcs": "git", "commit_id": "4f6b"}}')
    'sagaloom @ git+https://example.org/s.git@4f6b'
    """
    if direct_url is None:
        try:
            direct_url = distribution("sagaloom").read_text("direct_url.json")
        except PackageNotFoundError:
            return f"sagaloom @ {_checkout().as_uri()}"
    if not direct_url:
        return f"sagaloom>={_version()}"
    address: Mapping[str, Any] = json.loads(direct_url)
    url, origin = str(address["url"]), address.get("vcs_info")
    if origin is not None:
        url = f"{origin['vcs']}+{url}@{origin['commit_id']}"
    below = address.get("subdirectory")
    return f"sagaloom @ {url}" + (f"#subdirectory={below}" if below else "")


def _version() -> str:
    try:
        return distribution("sagaloom").version
    except PackageNotFoundError:
        return "0"


def _checkout() -> Path:
    return Path(__file__).resolve().parents[3]


def _files(folder: Traversable, package: str) -> list[tuple[Path, str]]:
    """Where each file of the template goes, and its text."""
    found: list[tuple[Path, str]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            here = Path(package if entry.name == "package" else entry.name)
            found += [(here / place, text) for place, text in _files(entry, package)]
        elif entry.name.endswith(_SUFFIX):
            name = entry.name.removesuffix(_SUFFIX)
            found.append((Path(f".{name}" if name == "gitignore" else name), entry.read_text(encoding="utf-8")))
    return found


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: words[found[1]], text)
