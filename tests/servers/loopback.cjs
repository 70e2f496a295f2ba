// node --require loopback.cjs SERVER: whatever the server listens on is a loopback port, that of the
// environment (LOOPBACK_PORT) or one that the system chose, and stderr says which.

const { Server } = require("node:net");

const listen = Server.prototype.listen;

Server.prototype.listen = function (...given) {
  const told = given.filter((each) => typeof each === "function");
  this.once("listening", () => console.error(`listening on http://127.0.0.1:${this.address().port}`));
  return listen.call(this, { port: Number(process.env.LOOPBACK_PORT ?? 0), host: "127.0.0.1" }, ...told);
};
