// A connection to WS /v1/live that reconnects by itself. The protocol: docs/use/live.md.

const RETRY_MS = [300, 600, 1200, 2500, 5000];

// States: connecting, loading (the server loads its model), live, busy (its queue is full), idle (closed after inactivity),
// full (too many sessions), lost (no connection, reconnecting), locked (needs a key).
export class LiveConnection {
  // handlers: state(name), ready(message), image({header, blob, sentAt}), error(message)
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
    this.sentAt = new Map(); // number of a message -> time of sending
    this.header = null;
    this.ended = null;
    const address = new URL("v1/live", this.base);
    address.protocol = address.protocol.replace("http", "ws");
    const socket = new WebSocket(address, this.protocols());
    socket.binaryType = "blob";
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.onText(JSON.parse(data)) : this.onImage(data));
    socket.onclose = () => this.socket === socket && this.onClose();
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

  // Sends settings (an object) or a drawing (a blob). Returns the number of the message, or 0 without a connection.
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

  // True while so much waits to be sent that another drawing would only queue behind it.
  get congested() {
    return this.open && this.socket.bufferedAmount > 256 * 1024;
  }

  onText(message) {
    if (message.type === "picture") {
      this.header = message;
    } else if (message.type === "ready") {
      this.open = true;
      this.tries = 0;
      this.handlers.state("live");
      this.handlers.ready(message);
    } else if (message.type === "error") {
      if (message.code === "queue_full") this.handlers.state("busy");
      else this.handlers.error(message);
    } else if (message.type === "end") {
      this.ended = message;
    }
  }

  onImage(blob) {
    const header = this.header;
    const sentAt = this.sentAt.get(header.sequence);
    for (const number of this.sentAt.keys()) if (number <= header.sequence) this.sentAt.delete(number);
    this.handlers.state("live");
    this.handlers.image({ header, blob: new Blob([blob], { type: `image/${header.format}` }), sentAt });
  }

  async onClose() {
    const neverOpened = !this.open && !this.ended;
    this.open = false;
    const code = this.ended?.code;
    if (code === "idle") return this.handlers.state("idle");
    if (code === "not_ready") return this.retry("loading", 1000);
    if (code === "too_many_sessions") return this.retry("full", 3000);
    if (neverOpened && (await this.keyRefused())) return this.handlers.state("locked");
    return this.retry("lost", RETRY_MS[Math.min(this.tries++, RETRY_MS.length - 1)]);
  }

  retry(state, delay) {
    this.handlers.state(state);
    this.timer = setTimeout(() => this.connect(), delay);
  }

  // True if the server refused the key: a browser does not say why a websocket could not be opened.
  async keyRefused() {
    try {
      return (await this.fetch("v1/info")).status === 401;
    } catch {
      return false; // the server is unreachable
    }
  }

  fetch(path) {
    return fetch(new URL(path, this.base), { headers: this.key ? { authorization: `Bearer ${this.key}` } : {} });
  }
}
