// Server-sent events over fetch, which, unlike EventSource, can bring an API key and tells why it was refused.

const QUIET_MS = 20_000; // a hidden page stops watching after so long

/** Watch `url` until the page goes: `told(frame)` for each frame, `stands(kind, text)` when the connection changes. */
export async function watch(url, { key, told, stands }) {
  for (let failures = 0; ; failures++) {
    await visible();
    const used = key();
    try {
      const { status, body } = await open(url, used, (frame) => {
        failures = 0;
        told(frame);
      });
      if (status === 401 || status === 403) {
        stands("key", "an API key is needed");
        await key.changed(used);
        continue;
      } else if (status === 429) {
        stands("wait", "as many watch as may; trying again");
      } else if (body === "end") {
        stands("lost", "the engine has stopped");
      } else if (status !== 200) {
        stands("lost", `refused (${status})`);
      }
    } catch {
      stands("lost", "not connected; trying again");
    }
    await pause(Math.min(8_000, 500 * 2 ** Math.min(failures, 4)));
  }
}

async function open(url, key, told) {
  const quiet = new AbortController();
  let timer = 0;
  const look = () => {
    clearTimeout(timer);
    if (document.hidden) timer = setTimeout(() => quiet.abort(), QUIET_MS);
  };
  document.addEventListener("visibilitychange", look);
  try {
    const headers = { Accept: "text/event-stream", ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(url, { headers, signal: quiet.signal, cache: "no-store" });
    if (response.status !== 200) return { status: response.status };
    return { status: 200, body: await read(response.body, told) };
  } finally {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", look);
  }
}

async function read(stream, told) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return "cut";
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (event.startsWith("event: end")) return "end";
      if (event.startsWith("data: ")) told(JSON.parse(event.slice(6)));
    }
  }
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

const visible = () =>
  document.hidden
    ? new Promise((done) => document.addEventListener("visibilitychange", done, { once: true })).then(visible)
    : null;
