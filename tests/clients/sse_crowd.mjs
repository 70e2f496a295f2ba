// Many HTTP+SSE clients of the official TypeScript SDK.
//
//     node sse_crowd.mjs --ports 8001 --clients 0-25 --calls 20 [--tool echo]
//
// Works as sse_crowd.py does. The SDK is that of tests/node/package.json.

import { createRequire } from "node:module";
import { parseArgs } from "node:util";

const require = createRequire(new URL("../node/package.json", import.meta.url));
const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
const { SSEClientTransport } = require("@modelcontextprotocol/sdk/client/sse.js");

const { values: given } = parseArgs({
  options: {
    ports: { type: "string" },
    clients: { type: "string" },
    calls: { type: "string", default: "20" },
    pause: { type: "string", default: "0.5" },
    path: { type: "string", default: "/sse" },
    tool: { type: "string", default: "prove" },
  },
});
const ports = given.ports.split(",");
const [first, last] = given.clients.split("-").map(Number);
const calls = Number(given.calls);

let isFinished = false;
const finished = new Promise((resolve) => {
  process.stdin.on("end", () => resolve((isFinished = true)));
  process.stdin.resume();
});

const monotonic = () => Number(process.hrtime.bigint()) / 1e9; // the clock of Python's time.monotonic

async function make(client, line) {
  const said = `${line.mine} call ${line.call}`;
  Object.assign(line, { expected: said, started: monotonic() });
  const args = given.tool === "echo" ? { message: said } : { marker: line.mine, said };
  try {
    const result = await client.callTool({ name: given.tool, arguments: args });
    const { text } = result.content[0];
    Object.assign(line, given.tool === "echo" ? { text } : JSON.parse(text));
  } catch (error) {
    line.error = String(error);
  }
  console.log(JSON.stringify({ ...line, ended: monotonic() }));
}

async function run(number) {
  const client = new Client({ name: "test", version: "1" });
  const url = new URL(`http://127.0.0.1:${ports[number % ports.length]}${given.path}`);
  await client.connect(new SSEClientTransport(url));
  await client.listTools();
  for (let call = 1; call <= calls || !isFinished; call += 1) {
    await make(client, { client: number, call, mine: `typescript client ${number}` });
    if (call >= calls) {
      let timer;
      const pause = new Promise((resolve) => (timer = setTimeout(resolve, 1000 * Number(given.pause))));
      await Promise.race([finished, pause]);
      clearTimeout(timer);
    }
  }
  await client.close();
}

await Promise.all(Array.from({ length: last - first }, (_, at) => run(first + at)));
process.exit(0);
