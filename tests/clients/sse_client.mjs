// Many sessions of the official TypeScript SDK 1.x over its HTTP+SSE transport, all at once.
//
//     node sse_client.mjs --ports 8001 --clients 50-100 [--at-once 2] [--pause 0.2]
//
// The twin of sse_client.py: the same server, the same calls, the same lines of JSON, until standard
// input ends. Each session first tries streamable HTTP at the same URL, as clients of both wires do.

import { randomBytes } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";

import { crowdArguments, now, require, runCrowd, say } from "./sdk_session.mjs";

const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
const { SSEClientTransport } = require("@modelcontextprotocol/sdk/client/sse.js");
const { StreamableHTTPClientTransport } = require("@modelcontextprotocol/sdk/client/streamableHttp.js");
const { CreateMessageRequestSchema, ProgressNotificationSchema } = require("@modelcontextprotocol/sdk/types.js");

const STEPS = [1, 2, 3];
const KINDS = ["plain", "progress", "sample"];
const LABEL = "x-worker";
const CALL_TIME = 60_000;

class Wrong extends Error {}

class Session {
  constructor(number, given) {
    this.number = number;
    this.given = given;
    this.token = `typescript-${number}-${randomBytes(8).toString("hex")}`;
    this.calls = 0;
    this.posts = new Map(); // call number -> a promise of its JSON-RPC id and the worker that got it
    this.heard = new Map(); // call number -> what was said of its progress
    this.streams = 0;
    this.session = "";
    this.strange = []; // what came and belonged to none of our calls
  }

  // The SDK's own fetch, noted. A POST may be acknowledged after its call was answered on the stream.
  fetch = (url, init) => {
    const responded = fetch(url, init);
    if (init?.method !== "POST") {
      this.streams += 1;
      return responded;
    }
    this.session = new URL(url).search.slice(1);
    const { id, method, params } = JSON.parse(init.body);
    if (method === "tools/call") {
      const noted = responded.then(({ headers }) => ({ id, worker: Number(headers.get(LABEL)) }));
      this.posts.set(params.arguments.number, noted.catch(() => ({ id })));
    }
    return responded;
  };

  answer = async ({ params }) => {
    const content = [params.messages[0].content].flat()[0];
    if (content.text.split(" ")[0] !== this.token) this.strange.push(`question ${content.text}`);
    return { role: "assistant", content: { type: "text", text: `yes ${content.text}` }, model: "none" };
  };

  // The SDK's own handler forgets a call as soon as it is answered, and then drops what came before
  // the answer but in the same read; so this stands in its place.
  hear = ({ params }) => {
    const [token, number] = params.message.split(" ");
    if (token !== this.token) this.strange.push(`progress ${params.message}`);
    this.heard.get(Number(number))?.push(params.message);
  };

  async requireFallback(url) {
    const client = new Client({ name: this.token, version: "1" });
    const outcome = await client.connect(new StreamableHTTPClientTransport(url)).catch((error) => error.code);
    if (outcome !== 405) this.strange.push(`streamable HTTP: ${outcome}`);
    await client.close();
  }

  async live(finish) {
    const about = { name: this.token, version: "1" };
    const client = new Client(about, { capabilities: { sampling: {} } });
    client.setRequestHandler(CreateMessageRequestSchema, this.answer);
    client.setNotificationHandler(ProgressNotificationSchema, this.hear);
    client.onerror = (error) => this.strange.push(String(error));
    const url = new URL(`http://127.0.0.1:${this.given.ports[0]}/sse`);
    await this.requireFallback(url);
    await client.connect(new SSEClientTransport(url, { fetch: this.fetch }));
    say({ open: this.number, session: this.session });
    while (!finish.isSet) {
      await Promise.all(Array.from({ length: this.given["at-once"] }, () => this.call(client)));
      await sleep(Math.random() * this.given.pause * 1000);
    }
    client.onerror = undefined;
    await client.close();
    if (this.streams !== 1) this.strange.push(`${this.streams} streams`);
    say({ end: this.number, session: this.session, strange: this.strange });
  }

  async call(client) {
    this.calls += 1;
    const number = this.number * 1_000_000 + this.calls;
    const kind = KINDS[this.calls % KINDS.length];
    const line = { client: this.number, call: number, kind, started: now() };
    try {
      line.owner = await this.answered(client, kind, number);
    } catch (error) {
      line[error instanceof Wrong ? "wrong" : "error"] = String(error);
    }
    line.ended = now();
    Object.assign(line, await this.posts.get(number));
    this.posts.delete(number);
    say(line);
  }

  async answered(client, kind, number) {
    const heard = [];
    this.heard.set(number, heard);
    const options = { timeout: CALL_TIME };
    if (kind === "progress") options.onprogress = () => {}; // asks the server for it
    const given = { token: this.token, number };
    const result = await client.callTool({ name: kind, arguments: given }, undefined, options);
    const answer = JSON.parse(result.content[0].text);
    const ours = { token: this.token, given: this.token, number, executions: 1 };
    if (kind === "sample") ours.said = `yes ${this.token} ${number}`;
    const shown = Object.fromEntries(Object.keys(ours).map((key) => [key, answer[key]]));
    requireEqual(shown, ours);
    const steps = kind === "progress" ? STEPS : [];
    await sleep(0); // what came before the answer is handled after it
    this.heard.delete(number);
    requireEqual(heard, steps.map((step) => `${this.token} ${number} ${step}`));
    return answer.worker;
  }
}

function requireEqual(found, ours) {
  if (!isDeepStrictEqual(found, ours)) {
    throw new Wrong(`${JSON.stringify(found)} came for ${JSON.stringify(ours)}`);
  }
}

const given = crowdArguments({ "at-once": 2, pause: 0.2 });
await runCrowd(given.clients, (number, finish) => new Session(number, given).live(finish));
