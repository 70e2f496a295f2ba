// Many HTTP+SSE clients of the official TypeScript SDK.
//
//     node sse_crowd.mjs --ports 8001 --clients 0-25 --calls 20 [--tool echo]
//
// Works as sse_crowd.py does.

import { crowdArguments, now, require, runCrowd, say } from "./sdk_session.mjs";

const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
const { SSEClientTransport } = require("@modelcontextprotocol/sdk/client/sse.js");

const given = crowdArguments({ calls: 20, pause: 0.5, path: "/sse", tool: "prove" });

async function make(client, line) {
  const said = `${line.mine} call ${line.call}`;
  Object.assign(line, { expected: said, started: now() });
  const args = given.tool === "echo" ? { message: said } : { marker: line.mine, said };
  try {
    const result = await client.callTool({ name: given.tool, arguments: args });
    const { text } = result.content[0];
    Object.assign(line, given.tool === "echo" ? { text } : JSON.parse(text));
  } catch (error) {
    line.error = String(error);
  }
  say({ ...line, ended: now() });
}

async function live(number, finish) {
  const client = new Client({ name: "test", version: "1" });
  const url = new URL(`http://127.0.0.1:${given.ports[number % given.ports.length]}${given.path}`);
  await client.connect(new SSEClientTransport(url));
  await client.listTools();
  for (let call = 1; call <= given.calls || !finish.isSet; call += 1) {
    await make(client, { client: number, call, mine: `typescript client ${number}` });
    if (call >= given.calls) {
      let timer;
      const pause = new Promise((resolve) => (timer = setTimeout(resolve, 1000 * given.pause)));
      await Promise.race([finish.wait, pause]);
      clearTimeout(timer);
    }
  }
  await client.close();
}

await runCrowd(given.clients, live);
