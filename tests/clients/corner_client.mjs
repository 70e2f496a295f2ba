// A client of the official TypeScript SDK, 1.x or 2.x, that takes every step of the corners.
//
//     node corner_client.mjs TARGET 1|2 legacy|auto|modern TRACE [MEMBER]
//
// The twin of corner_client.py: the same steps, the same document.

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

import { require, say } from "./sdk_session.mjs";

const STEP_TIME = 6_000;
const START_TIME = 25_000; // of what may have to wait for servers that start
const ALL_TIME = 45_000;
const LOG_LEVEL = "io.modelcontextprotocol/logLevel";
const TOLD = {
  message: "notifications/message",
  tool: "notifications/tools/list_changed",
  prompt: "notifications/prompts/list_changed",
  resource: "notifications/resources/list_changed",
  updated: "notifications/resources/updated",
};
const ABOUT = { name: "corner", version: "1" };
const CAPABILITIES = { elicitation: { form: {}, url: {} }, sampling: {}, roots: {} };

function versionOf(name) {
  const file = new URL(`../node/node_modules/${name}/package.json`, import.meta.url);
  return JSON.parse(readFileSync(file, "utf8")).version;
}

// --- what differs between the SDKs -----------------------------------------------------------------

function sdk1() {
  const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
  const { StreamableHTTPClientTransport } = require("@modelcontextprotocol/sdk/client/streamableHttp.js");
  const { StdioClientTransport } = require("@modelcontextprotocol/sdk/client/stdio.js");
  const types = require("@modelcontextprotocol/sdk/types.js");
  const requests = {
    "elicitation/create": types.ElicitRequestSchema,
    "sampling/createMessage": types.CreateMessageRequestSchema,
    "roots/list": types.ListRootsRequestSchema,
  };
  const notifications = {
    [TOLD.message]: types.LoggingMessageNotificationSchema,
    [TOLD.tool]: types.ToolListChangedNotificationSchema,
    [TOLD.prompt]: types.PromptListChangedNotificationSchema,
    [TOLD.resource]: types.ResourceListChangedNotificationSchema,
    [TOLD.updated]: types.ResourceUpdatedNotificationSchema,
  };
  return {
    version: versionOf("@modelcontextprotocol/sdk"),
    StreamableHTTPClientTransport,
    StdioClientTransport,
    client: () => new Client(ABOUT, { capabilities: CAPABILITIES }),
    // SDK 1.x keeps to itself what was agreed on, and the stdio transport is not told.
    revision: (client, transport) => transport.protocolVersion ?? types.LATEST_PROTOCOL_VERSION,
    on: (client, method, handler) =>
      method in requests
        ? client.setRequestHandler(requests[method], handler)
        : client.setNotificationHandler(notifications[method], handler),
    call: (client, params, options) => client.callTool(params, undefined, options),
  };
}

function sdk2(mode) {
  const { Client, StreamableHTTPClientTransport } = require("@modelcontextprotocol/client");
  const { StdioClientTransport } = require("@modelcontextprotocol/client/stdio");
  const versionNegotiation = { mode: mode === "modern" ? { pin: "2026-07-28" } : mode };
  return {
    version: versionOf("@modelcontextprotocol/client"),
    StreamableHTTPClientTransport,
    StdioClientTransport,
    client: () => new Client(ABOUT, { capabilities: CAPABILITIES, versionNegotiation }),
    revision: (client) => client.getNegotiatedProtocolVersion(),
    on: (client, method, handler) =>
      method.startsWith("notifications/")
        ? client.setNotificationHandler(method, handler)
        : client.setRequestHandler(method, handler),
    call: (client, params, options) => client.callTool(params, options),
  };
}

// --- one session -----------------------------------------------------------------------------------

class Corner {
  constructor(sdk, trace, { names = "", uris = "" }) {
    this.sdk = sdk;
    this.names = names;
    this.uris = uris;
    this.trace = trace;
    this.label = randomBytes(8).toString("hex");
    this.asked = [];
    this.heard = [];
    this.client = sdk.client();
    sdk.on(this.client, "elicitation/create", async ({ params }) => {
      const mode = params.mode ?? "form";
      this.asked.push([`elicitation ${mode}`, params.message]);
      if (mode === "url") return { action: "accept" };
      return { action: "accept", content: { answer: `answer to ${params.message}` } };
    });
    sdk.on(this.client, "sampling/createMessage", async ({ params }) => {
      const { text } = [params.messages[0].content].flat()[0];
      this.asked.push(["sampling", text]);
      return { role: "assistant", content: { type: "text", text: `thought on ${text}` }, model: "none" };
    });
    sdk.on(this.client, "roots/list", async () => {
      this.asked.push(["roots", ""]);
      return { roots: [{ uri: "file:///corner", name: "corner" }] };
    });
    for (const method of Object.values(TOLD)) {
      sdk.on(this.client, method, ({ params }) => void this.heard.push({ method, params }));
    }
  }

  call(name, given = {}, options = undefined, _meta = undefined) {
    const params = { name: this.names + name, arguments: given, ...(_meta ? { _meta } : {}) };
    return this.sdk.call(this.client, params, options);
  }

  // The names, or URIs, of the server in a list, as it has them itself.
  own(listed, key = "name") {
    const start = key === "name" ? this.names : this.uris;
    return listed.map((it) => it[key]).filter((it) => it.startsWith(start)).map((it) => it.slice(start.length));
  }

  // What was asked while something ran, and what came of it.
  async beAsked(answered) {
    this.asked.length = 0;
    const answer = await answered();
    return { asked: this.asked.toSorted(), answer };
  }

  ask(tool, given) {
    return this.beAsked(async () => (await this.call(tool, given)).structuredContent);
  }

  heardOf(method) {
    return this.heard.filter((it) => it.method === method).map((it) => it.params ?? {});
  }

  async until(condition, time = 3_000) {
    const end = Date.now() + time;
    while (!condition() && Date.now() < end) await sleep(20);
    return condition();
  }

  // Does something with a subscription, where the revision has them, and waits for what comes of it.
  async listening(filter, methods, work) {
    const subscription = this.isModern ? await this.client.listen(filter) : undefined;
    await work();
    await this.until(() => methods.every((it) => this.heardOf(it).length));
    await subscription?.close();
  }
}

async function logged(corner, expected, meta) {
  corner.heard.length = 0;
  await corner.call("log", { label: corner.label }, undefined, meta);
  await corner.until(() => corner.heardOf(TOLD.message).length >= expected, 1_000);
  return corner.heardOf(TOLD.message).map((it) => [it.level, it.logger, it.data.replace(corner.label, "my")]);
}

// --- what is done in each session, in this order ---------------------------------------------------

const STEPS = {
  tools: async (corner) => corner.own((await corner.client.listTools()).tools),

  async echo(corner) {
    const result = await corner.call("echo", { text: "Grüße, 世界 \u{1F44B}" });
    return [result.content[0].text, result.structuredContent];
  },

  async count(corner) {
    const progress = [];
    const onprogress = (it) => progress.push([it.progress, it.total, it.message]);
    const result = await corner.call("count", { to: 3, pause: 0.1 }, { onprogress });
    return [progress, result.structuredContent];
  },

  header: async (corner) =>
    (await corner.call("header", { region: "Zürich 1", query: "all" })).structuredContent,

  unknown_tool: (corner) => corner.call("no such tool"),

  async failing(corner) {
    const result = await corner.call("fail");
    return [result.isError, result.content[0].text];
  },

  refused: (corner) => corner.call("fail", { error: { code: -31999, message: "no" } }),

  ask_form: (corner) => corner.ask("ask", { kind: "form" }),
  ask_url: (corner) => corner.ask("ask", { kind: "url" }),
  ask_sampling: (corner) => corner.ask("ask", { kind: "sampling" }),
  ask_roots: (corner) => corner.ask("ask", { kind: "roots" }),
  ask_both: (corner) => corner.ask("ask", { kind: "both" }),
  chain: (corner) => corner.ask("chain", { rounds: 3 }),

  ask_in_prompt: (corner) =>
    corner.beAsked(async () => {
      const prompt = await corner.client.getPrompt({ name: `${corner.names}asking` });
      return JSON.parse(prompt.messages[0].content.text);
    }),

  ask_in_resource: (corner) =>
    corner.beAsked(async () => {
      const resource = await corner.client.readResource({ uri: `${corner.uris}demo://asking` });
      return JSON.parse(resource.contents[0].text);
    }),

  url_required: (corner) => corner.ask("url_required", { key: corner.label }),

  async resources(corner) {
    const { resources } = await corner.client.listResources();
    const { contents } = await corner.client.readResource({ uri: `${corner.uris}demo://item/7` });
    return [corner.own(resources, "uri"), contents[0].text];
  },

  templates: async (corner) =>
    corner.own((await corner.client.listResourceTemplates()).resourceTemplates, "uriTemplate"),

  unknown_resource: ({ client, uris }) => client.readResource({ uri: `${uris}demo://none` }),

  async prompts(corner) {
    const { prompts } = await corner.client.listPrompts();
    const params = { name: `${corner.names}greet`, arguments: { name: "Eve" } };
    const { messages } = await corner.client.getPrompt(params);
    return [corner.own(prompts), messages[0].content.text];
  },

  async completion({ client, names }) {
    const argument = { name: "name", value: "par" };
    const result = await client.complete({ ref: { type: "ref/prompt", name: `${names}greet` }, argument });
    return result.completion.values;
  },

  log_before_a_level: (corner) => logged(corner, 1),

  async log_at_a_level(corner) {
    if (corner.isModern) return logged(corner, 2, { [LOG_LEVEL]: "warning" });
    await corner.client.setLoggingLevel("warning");
    return logged(corner, 2);
  },

  async updates(corner) {
    corner.heard.length = 0;
    const uri = `${corner.uris}demo://watched`;
    if (!corner.isModern) await corner.client.subscribeResource({ uri });
    await corner.listening({ resourceSubscriptions: [uri] }, [TOLD.updated], async () => {
      await corner.call("notify", { kinds: ["updated"], uri: "demo://static" });
      await corner.call("notify", { kinds: ["updated"], uri: "demo://watched" });
    });
    if (!corner.isModern) await corner.client.unsubscribeResource({ uri });
    return corner.own(corner.heardOf(TOLD.updated), "uri");
  },

  async changes(corner) {
    corner.heard.length = 0;
    const filter = { toolsListChanged: true, promptsListChanged: true, resourcesListChanged: true };
    const kinds = ["tools", "prompts", "resources"];
    const methods = [TOLD.tool, TOLD.prompt, TOLD.resource];
    await corner.listening(filter, methods, () => corner.call("notify", { kinds }));
    return ["prompt", "resource", "tool"].filter((it) => corner.heardOf(TOLD[it]).length);
  },

  async cancelled(corner) {
    const giveUp = new AbortController();
    const options = { signal: giveUp.signal, onprogress: () => giveUp.abort("enough") };
    await corner.call("slow", { seconds: 60, label: corner.label }, options).catch(() => {});
    const isCancelled = () =>
      readFileSync(corner.trace, "utf8")
        .split("\n")
        .some((it) => it.startsWith("cancelled") && it.endsWith(corner.label));
    return [await corner.until(isCancelled), await STEPS.echo(corner)];
  },
};

// --- all of them -----------------------------------------------------------------------------------

// A step that calls a tool of another server.
const calling = (name, given) => async (corner) => {
  const result = await corner.sdk.call(corner.client, { name, arguments: given });
  return [result.isError ?? false, result.content.map((it) => it.text)];
};

async function outcome(corner, step, limit = STEP_TIME) {
  const late = sleep(limit, { failed: "no end" }, { ref: false });
  try {
    return await Promise.race([step(corner), late]);
  } catch (error) {
    if (typeof error.code !== "number") return { failed: String(error) };
    return { error: error.code, message: error.message.replace(/^MCP error -?\d+: /, "") };
  }
}

const [target, generation, mode, trace, given = "{}"] = process.argv.slice(2);
const member = JSON.parse(given);
const sdk = generation === "1" ? sdk1() : sdk2(mode);
const [command, ...args] = target.startsWith("http") ? [] : JSON.parse(target);
const corner = new Corner(sdk, trace, member);
// Somebody of whom the proxy knows no roots yet.
const requestInit = { headers: { Authorization: `Bearer ${member.caller ?? corner.label}` } };
const transport = command
  ? new sdk.StdioClientTransport({ command, args, stderr: "ignore" })
  : new sdk.StreamableHTTPClientTransport(new URL(target), { requestInit });
await corner.client.connect(transport);
const revision = sdk.revision(corner.client, transport);
corner.isModern = revision >= "2026";
const record = { sdk: sdk.version, revision };
const end = Date.now() + ALL_TIME;
for (const [name, step] of Object.entries(STEPS)) {
  const limit = name === "tools" ? START_TIME : STEP_TIME;
  record[name] = Date.now() > end ? { failed: "not tried" } : await outcome(corner, step, limit);
}
record.calls = [];
for (const call of member.calls ?? []) record.calls.push(await outcome(corner, calling(...call), START_TIME));
await transport.terminateSession?.().catch(() => {});
await corner.client.close();
say(record);
process.exit(0); // a call that is still open would hold us
