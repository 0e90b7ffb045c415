"""A process that tells what is left of a story: `kill -9` ends it wherever the driver wants.

The nursery has imported everything, and forks an actor whenever it is asked to; what to tell stands in the file
`assignment` of its folder.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path

from examples.telling import Story, play
from sagaloom.testing.faults import Faults
from tests.crash.nursery import serve_births
from tests.examples.stories import STORIES


def story_called(name: str) -> Story:
    found: Story = importlib.import_module(f"examples.{name}").story
    return found


def act(folder: Path) -> int:
    """Tells the story to its end. Returns 0."""
    assignment = json.loads((folder / "assignment").read_text())
    story = story_called(assignment["story"])
    asyncio.run(play(story, Path(assignment["folder"]), url=assignment["url"], faults=Faults.from_env()))
    return 0


if __name__ == "__main__":
    for name in STORIES:
        story_called(name)
    serve_births(lambda tag, life: act(Path(sys.argv[1])))
