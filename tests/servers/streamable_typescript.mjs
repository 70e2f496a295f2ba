// A streamable HTTP server of the official TypeScript SDK: node streamable_typescript.mjs 1|2 PORT
//
// Its tool `echo` says what was said. A session that it does not know is answered by a transport
// that was made anew. stderr says where it listens. The SDKs are those of tests/node/package.json.

import { randomUUID } from "node:crypto";
import { createServer } from "node:http";
import { createRequire } from "node:module";

const require = createRequire(new URL("../node/package.json", import.meta.url));
const { z } = require("zod");

const [version, port] = process.argv.slice(2);
const { McpServer, Transport, shape } = version === "1" ? first() : second();
const transports = new Map();

function first() {
  const { McpServer } = require("@modelcontextprotocol/sdk/server/mcp.js");
  const { StreamableHTTPServerTransport } = require("@modelcontextprotocol/sdk/server/streamableHttp.js");
  return { McpServer, Transport: StreamableHTTPServerTransport, shape: (fields) => fields };
}

function second() {
  const { McpServer } = require("@modelcontextprotocol/server");
  const { NodeStreamableHTTPServerTransport } = require("@modelcontextprotocol/node");
  return { McpServer, Transport: NodeStreamableHTTPServerTransport, shape: z.object };
}

async function made() {
  const transport = new Transport({
    sessionIdGenerator: randomUUID,
    onsessioninitialized: (id) => transports.set(id, transport),
    onsessionclosed: (id) => transports.delete(id),
  });
  const server = new McpServer({ name: "streamable", version });
  server.registerTool("echo", { inputSchema: shape({ message: z.string() }) }, ({ message }) => ({
    content: [{ type: "text", text: `Echo: ${message}` }],
  }));
  await server.connect(transport);
  return transport;
}

const http = createServer(async (request, response) => {
  const transport = transports.get(request.headers["mcp-session-id"]) ?? (await made());
  await transport.handleRequest(request, response);
});
http.listen(Number(port), "127.0.0.1", () => {
  console.error(`listening on http://127.0.0.1:${http.address().port}`);
});
