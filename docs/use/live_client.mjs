// Sends a drawing, and saves the pictures: node docs/use/live_client.mjs ws://127.0.0.1:8000/v1/live drawing.png (Node 22)
// In a page the same code works as it is, but for reading and writing files.
import { readFileSync, writeFileSync } from "node:fs";

const [address, drawing] = process.argv.slice(2);
const socket = new WebSocket(address);
socket.binaryType = "arraybuffer";

let sent = 0;
let header = null;
const send = (message) => {
  socket.send(message);
  return ++sent; // the number by which a picture names the newest message that it shows
};

socket.onmessage = ({ data }) => {
  if (typeof data !== "string") {
    writeFileSync("live.jpg", new Uint8Array(data));
    console.log(`picture of message ${header.sequence} of ${sent}: ${header.timings_ms.total} ms`);
    if (header.sequence === sent) socket.close();
    return;
  }
  header = JSON.parse(data);
  if (header.type === "error" || header.type === "end") console.error(header.detail);
  if (header.type === "ready") {
    send(JSON.stringify({ prompt: "a red circle", seed: 7 }));
    send(readFileSync(drawing));
  }
};
