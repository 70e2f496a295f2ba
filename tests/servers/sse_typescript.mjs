// An HTTP+SSE server made with the official TypeScript SDK: node sse_typescript.mjs NAME
//
// Its tool `prove` says which session, and which call of it, was answered. stderr says where it
// listens. The SDK is that of tests/node/package.json.

import { createServer } from "node:http";
import { createRequire } from "node:module";

const require = createRequire(new URL("../node/package.json", import.meta.url));
const { Server } = require("@modelcontextprotocol/sdk/server/index.js");
const { SSEServerTransport } = require("@modelcontextprotocol/sdk/server/sse.js");
const { CallToolRequestSchema, ListToolsRequestSchema } = require("@modelcontextprotocol/sdk/types.js");

const [name] = process.argv.slice(2);
const transports = new Map();

const text = (value) => ({ content: [{ type: "text", text: value }] });

// One server for each session, which remembers the first marker and counts the calls.
function serverOf(session) {
  const memory = { marker: null, calls: 0 };
  const server = new Server({ name, version: "1" }, { capabilities: { tools: {} } });
  server.setRequestHandler(ListToolsRequestSchema, () => ({
    tools: ["prove", "echo"].map((tool) => ({ name: tool, inputSchema: { type: "object" } })),
  }));
  server.setRequestHandler(CallToolRequestSchema, ({ params }, { requestId }) => {
    const { marker, said, message } = params.arguments;
    if (params.name === "echo") return text(`Echo: ${message}`);
    memory.marker ??= marker;
    memory.calls += 1;
    const proof = { name, pid: process.pid, session, counter: memory.calls, marker: memory.marker, said, id: requestId };
    return text(JSON.stringify(proof));
  });
  return server;
}

async function open(response) {
  const transport = new SSEServerTransport("/message", response);
  transports.set(transport.sessionId, transport);
  response.on("close", () => transports.delete(transport.sessionId));
  await serverOf(transport.sessionId).connect(transport);
}

async function take(url, request, response) {
  const transport = transports.get(url.searchParams.get("sessionId"));
  if (transport) await transport.handlePostMessage(request, response);
  else response.writeHead(404).end("No such session");
}

const http = createServer(async (request, response) => {
  const url = new URL(request.url, "http://localhost");
  if (request.method === "GET" && url.pathname === "/sse") await open(response);
  else if (request.method === "POST" && url.pathname === "/message") await take(url, request, response);
  else response.writeHead(url.pathname === "/sse" ? 405 : 404).end();
});
http.listen(0, "127.0.0.1", () => console.error(`listening on http://127.0.0.1:${http.address().port}`));
