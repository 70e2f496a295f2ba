// A client made with the official TypeScript SDK, 1.x or 2.x.
//
//     node typescript_client.mjs URL 1
//     node typescript_client.mjs URL 2 [default|auto]
//
// Talks to the demo server at URL and prints one JSON document of what came back. The last argument
// is how a 2.x client finds out what the server speaks: by default it initializes, auto probes first.

import { readFileSync } from "node:fs";

import { require, say } from "./sdk_session.mjs";

// What the person, or the model, at this end says when it is asked.
const ANSWER = "forty-two";

function versionOf(name) {
  const file = new URL(`../node/node_modules/${name}/package.json`, import.meta.url);
  return JSON.parse(readFileSync(file, "utf8")).version;
}

// What differs between the SDKs: names, how a request is named to its handler, and callTool's arguments.
function sdk1() {
  const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
  const { StreamableHTTPClientTransport } = require("@modelcontextprotocol/sdk/client/streamableHttp.js");
  const types = require("@modelcontextprotocol/sdk/types.js");
  return {
    version: versionOf("@modelcontextprotocol/sdk"),
    transport: (url) => new StreamableHTTPClientTransport(new URL(url)),
    client: (capabilities) => new Client({ name: "test", version: "1" }, { capabilities }),
    onElicitation: (client, handler) => client.setRequestHandler(types.ElicitRequestSchema, handler),
    onSampling: (client, handler) => client.setRequestHandler(types.CreateMessageRequestSchema, handler),
    call: (client, params, options) => client.callTool(params, undefined, options),
  };
}

function sdk2(mode) {
  const { Client, StreamableHTTPClientTransport } = require("@modelcontextprotocol/client");
  const negotiation = mode === "default" ? {} : { versionNegotiation: { mode } };
  return {
    version: versionOf("@modelcontextprotocol/client"),
    transport: (url) => new StreamableHTTPClientTransport(new URL(url)),
    client: (capabilities) =>
      new Client({ name: "test", version: "1" }, { capabilities, ...negotiation }),
    onElicitation: (client, handler) => client.setRequestHandler("elicitation/create", handler),
    onSampling: (client, handler) => client.setRequestHandler("sampling/createMessage", handler),
    call: (client, params, options) => client.callTool(params, options),
  };
}

async function connected(sdk, client, url, work) {
  const transport = sdk.transport(url);
  await client.connect(transport);
  try {
    return await work(transport.protocolVersion);
  } finally {
    await transport.terminateSession();
    await client.close();
  }
}

// Lists the tools and calls them; a question is answered by elicitation.
function withElicitation(sdk, url) {
  const elicited = [];
  const progress = [];
  const client = sdk.client({ elicitation: {} });
  sdk.onElicitation(client, async ({ params }) => {
    elicited.push(params);
    return { action: "accept", content: { answer: ANSWER } };
  });
  const onprogress = ({ progress: done, total }) => progress.push([done, total]);
  return connected(sdk, client, url, async (revision) => {
    const { tools } = await client.listTools();
    const echo = await sdk.call(client, { name: "echo", arguments: { text: "Grüße, 世界 \u{1F44B}" } });
    const count = await sdk.call(client, { name: "count", arguments: { to: 3, pause: 0.1 } }, { onprogress });
    const ask = await sdk.call(client, { name: "ask", arguments: { question: "How much?" } });
    return {
      revision,
      tools: tools.map((tool) => tool.name),
      echo: echo.content,
      count: count.content,
      progress,
      elicited,
      elicitation: ask.content,
    };
  });
}

// A client without elicitation: the question comes as a request for a model's answer.
function withSampling(sdk, url) {
  const sampled = [];
  const client = sdk.client({ sampling: {} });
  sdk.onSampling(client, async ({ params }) => {
    sampled.push(params);
    return { role: "assistant", content: { type: "text", text: ANSWER }, model: "none" };
  });
  return connected(sdk, client, url, async () => {
    const ask = await sdk.call(client, { name: "ask", arguments: { question: "How much?" } });
    return { sampled, sampling: ask.content };
  });
}

const [url, generation, mode = "default"] = process.argv.slice(2);
const sdk = generation === "1" ? sdk1() : sdk2(mode);
const seen = { ...(await withElicitation(sdk, url)), ...(await withSampling(sdk, url)) };
say({ sdk: sdk.version, ...seen });
