// A client of the official TypeScript SDK, 1.x or 2.x, that does in one session what its standard
// input says. As driven_client.py does for Python.
//
//     node driven_client.mjs URL 1|2 default|auto

import { createInterface } from "node:readline";

import { require, say } from "./sdk_session.mjs";

function made(generation, mode) {
  const about = { name: "test", version: "1" };
  if (generation === "1") {
    const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
    const { StreamableHTTPClientTransport } = require("@modelcontextprotocol/sdk/client/streamableHttp.js");
    return [new Client(about), StreamableHTTPClientTransport];
  }
  const { Client, StreamableHTTPClientTransport } = require("@modelcontextprotocol/client");
  const negotiation = mode === "default" ? {} : { versionNegotiation: { mode } };
  return [new Client(about, negotiation), StreamableHTTPClientTransport];
}

async function done(client, command) {
  if (command.notify) {
    const params = { progressToken: "nobody's", progress: 1 };
    await client.notification({ method: "notifications/progress", params });
    return "sent";
  }
  const result = await client.callTool({ name: command.tool, arguments: command.arguments });
  const text = result.content[0].text;
  return result.isError ? `failed: ${text}` : text;
}

const [url, generation, mode] = process.argv.slice(2);
const [client, Transport] = made(generation, mode);
const transport = new Transport(new URL(url));
await client.connect(transport);
say({ outcome: "ready" });
for await (const line of createInterface({ input: process.stdin })) {
  try {
    say({ outcome: await done(client, JSON.parse(line)) });
  } catch (error) {
    say({ outcome: `failed: ${error.message}` });
  }
}
await client.close();
process.exit(0);
