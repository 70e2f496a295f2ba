// A client of the official TypeScript SDK, 1.x or 2.x, whose server is killed by one of its tools.
//
//     node mortal_client.mjs URL 1|2 default|auto ARGUMENTS
//
// Calls `ok`, `die` with the arguments, a JSON object, and `ok` in one session with the server of
// tests/servers/mortal.py, and prints what came of each. As mortal_client.py does for Python.

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

// The text of a call's result, or its error in words.
async function outcome(client, name, args) {
  try {
    return (await client.callTool({ name, arguments: args })).content[0].text;
  } catch (error) {
    return `failed: ${error.message}`;
  }
}

const [url, generation, mode, given] = process.argv.slice(2);
const [client, Transport] = made(generation, mode);
const transport = new Transport(new URL(url));
await client.connect(transport);
const outcomes = [];
outcomes.push(await outcome(client, "ok", {}));
outcomes.push(await outcome(client, "die", JSON.parse(given)));
outcomes.push(await outcome(client, "ok", {}));
await transport.terminateSession();
await client.close();
say({ outcomes });
