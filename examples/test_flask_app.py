"""How an application tests its MCP endpoint: werkzeug's test client, no server, no port."""

from werkzeug.test import Client

from examples.flask_app import app

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}
ECHO = {
    "jsonrpc": "2.0",
    "id": 2,
    "method": "tools/call",
    "params": {"name": "echo", "arguments": {"text": "Hello"}},
}


def test_a_tool_answers_beside_the_page() -> None:
    client = Client(app)
    assert "MCP server" in client.get("/").text

    opened = client.post("/mcp", json=INITIALIZE)
    session = {"Mcp-Session-Id": opened.headers["Mcp-Session-Id"]}
    initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    assert client.post("/mcp", json=initialized, headers=session).status_code == 202

    answer = client.post("/mcp", json=ECHO, headers=session)
    assert answer.json["result"]["content"] == [{"type": "text", "text": "Hello"}]
    assert client.delete("/mcp", headers=session).status_code == 204
