// A connection to WS /v1/live that comes back by itself. The protocol: docs/use/live.md.

const RETRY_MS = [300, 600, 1200, 2500, 5000];

// States: connecting, loading (the server, its model), live, busy (its queue is full), idle (nothing was sent for long),
// full (too many people draw), lost (no connection; it tries again), locked (it needs a key).
export class LiveConnection {
  // handlers: state(name, detail), ready(what the server said), picture({header, blob, sentAt}), error(what it said)
  constructor(base, handlers) {
    this.base = base;
    this.handlers = handlers;
    this.key = null;
    this.tries = 0;
    this.socket = null;
    this.open = false;
  }

  connect() {
    clearTimeout(this.timer);
    this.open = false;
    this.sent = 0;
    this.sentAt = new Map(); // number of a message -> when it left
    this.header = null;
    this.ended = null;
    const address = new URL("v1/live", this.base);
    address.protocol = address.protocol.replace("http", "ws");
    const socket = new WebSocket(address, this.protocols());
    socket.binaryType = "blob";
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.hear(JSON.parse(data)) : this.see(data));
    socket.onclose = () => this.socket === socket && this.closed();
    this.socket = socket;
  }

  protocols() {
    const names = ["sana-sprint.live.v1"];
    if (this.key) {
      const bytes = String.fromCharCode(...new TextEncoder().encode(this.key));
      names.push("bearer." + btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", ""));
    }
    return names;
  }

  // Sends settings (an object) or a drawing (a blob); its number, or 0 where there is no connection.
  send(message) {
    if (!this.open) {
      if (this.ended?.code === "idle") this.connect();
      return 0;
    }
    this.socket.send(message instanceof Blob ? message : JSON.stringify(message));
    this.sent += 1;
    this.sentAt.set(this.sent, performance.now());
    return this.sent;
  }

  // Whether so much waits to be sent that another drawing would only wait behind it.
  get congested() {
    return this.open && this.socket.bufferedAmount > 256 * 1024;
  }

  hear(told) {
    if (told.type === "picture") {
      this.header = told;
    } else if (told.type === "ready") {
      this.open = true;
      this.tries = 0;
      this.handlers.state("live");
      this.handlers.ready(told);
    } else if (told.type === "error") {
      if (told.code === "queue_full") this.handlers.state("busy");
      else this.handlers.error(told);
    } else if (told.type === "end") {
      this.ended = told;
    }
  }

  see(blob) {
    const header = this.header;
    const sentAt = this.sentAt.get(header.sequence);
    for (const number of this.sentAt.keys()) if (number <= header.sequence) this.sentAt.delete(number);
    this.handlers.state("live");
    this.handlers.picture({ header, blob: new Blob([blob], { type: `image/${header.format}` }), sentAt });
  }

  async closed() {
    const neverOpened = !this.open && !this.ended;
    this.open = false;
    const code = this.ended?.code;
    if (code === "idle") return this.handlers.state("idle");
    if (code === "not_ready") return this.again("loading", 1000);
    if (code === "too_many_sessions") return this.again("full", 3000);
    if (neverOpened && (await this.refused())) return this.handlers.state("locked");
    return this.again("lost", RETRY_MS[Math.min(this.tries++, RETRY_MS.length - 1)]);
  }

  again(state, delay) {
    this.handlers.state(state);
    this.timer = setTimeout(() => this.connect(), delay);
  }

  // Whether it was the key: a browser does not tell why a websocket could not be opened.
  async refused() {
    try {
      return (await this.fetch("v1/info")).status === 401;
    } catch {
      return false; // the server cannot be reached at all
    }
  }

  fetch(path) {
    return fetch(new URL(path, this.base), { headers: this.key ? { authorization: `Bearer ${this.key}` } : {} });
  }
}
