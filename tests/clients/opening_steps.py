"""What every server is asked first, whatever else it offers."""

from __future__ import annotations

from typing import Any

from tests.clients.recording import Recording


async def initialize(talk: Recording) -> Any:
    result = talk.session.initialize_result
    assert result is not None
    return result.model_dump(by_alias=True, mode="json", exclude_unset=True)


async def ping(talk: Recording) -> Any:
    return await talk.ask("ping")


async def list_tools(talk: Recording) -> Any:
    return await talk.ask("tools/list")
