// What the client programs beside this share: the official TypeScript SDKs, which are those of
// tests/node/package.json, and crowds of clients. As sdk_session.py does for Python.

import { createRequire } from "node:module";
import { parseArgs } from "node:util";

// What loads a module of an SDK.
export const require = createRequire(new URL("../node/package.json", import.meta.url));

// The clock of Python's time.monotonic.
export const now = () => Number(process.hrtime.bigint()) / 1e9;

// Writes a line of JSON.
export const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");

// What the command line of a crowd says: where to, which clients, and the options that have these
// defaults. Numbers are numbers.
export function crowdArguments(defaults) {
  const options = { ports: { type: "string" }, clients: { type: "string" } };
  for (const [name, value] of Object.entries(defaults)) options[name] = { type: "string", default: String(value) };
  const { values } = parseArgs({ options });
  const given = { ports: values.ports.split(",") };
  for (const [name, value] of Object.entries(defaults)) {
    given[name] = typeof value === "number" ? Number(values[name]) : values[name];
  }
  const [first, end] = values.clients.split("-").map(Number);
  given.clients = Array.from({ length: end - first }, (_, n) => first + n);
  return given;
}

// Runs the lives of all clients at once, which are told when standard input has ended.
export async function runCrowd(clients, life) {
  const finish = { isSet: false };
  finish.wait = new Promise((resolve) => {
    process.stdin.on("end", () => resolve((finish.isSet = true))).resume();
  });
  await Promise.all(clients.map((number) => life(number, finish)));
  process.exit(0); // connections that are kept alive would hold us for a few seconds
}
